"""Prefix caching with compaction: prompts share blocks, and no request finds compacted rows by mistake."""

import pytest
import torch
from engine import greedy, keep

from vllm_l2kv.kernels.reference import LayerRows
from vllm_l2kv.scheduler.cache_manager import CompressedLayerManager
from vllm_l2kv.worker.rows import cpu_rows


def test_the_same_prompt_at_another_ratio_hits_and_answers_as_on_a_fresh_engine(compressing, text_ids):
    prompt = text_ids[:520]
    fresh = {ratio: compressing.fresh_tokens(prompt, keep(ratio)) for ratio in ("0.5", "0.3")}
    assert fresh["0.5"] != fresh["0.3"]  # otherwise the comparison would show little

    assert compressing.kv_cache_manager.reset_prefix_cache()
    (first,) = compressing.generate([prompt], [keep("0.5")])
    (second,) = compressing.generate([prompt], [keep("0.3")])
    (third,) = compressing.generate([prompt], [keep("0.5")])
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == third.num_cached_tokens == 512
    assert list(second.outputs[0].token_ids) == fresh["0.3"]
    assert list(third.outputs[0].token_ids) == fresh["0.5"]


def test_prompts_that_part_inside_a_block_of_full_layers_answer_as_on_a_fresh_engine(compressing, reference, text_ids):
    """The second finds the first's block of 448 tokens up to token 192, and gets a copy of it."""
    first, second = text_ids[:300], text_ids[:200] + text_ids[700:800]
    assert compressing.kv_cache_manager.reset_prefix_cache()
    for ratio in ("1.0", "0.5"):
        compressing.generate([first], [keep(ratio)])
        (output,) = compressing.generate([second], [keep(ratio)])
        assert output.num_cached_tokens >= 192
        assert list(output.outputs[0].token_ids) == reference.generate(second, 12, ratio)
        (again,) = compressing.generate([first], [keep(ratio)])
        assert again.num_cached_tokens == 288
        assert list(again.outputs[0].token_ids) == reference.generate(first, 12, ratio)


def test_one_group_hits_at_the_granularity_of_its_blocks(all_layers, text_ids):
    prompt = text_ids[:200]
    assert all_layers.kv_cache_manager.reset_prefix_cache()
    all_layers.generate([prompt], [keep("0.3", num_tokens=3)])
    (second,) = all_layers.generate([prompt], [keep("0.5", num_tokens=3)])
    assert second.num_cached_tokens == 192


def rows_of(engine, req_id: str) -> list[LayerRows]:
    """Returns copies of all rows that a request's tables point to in compressed layers."""
    copies = []
    groups = engine.worker.model_runner.kv_cache_config.kv_cache_groups
    for manager, group in zip(engine.managers, groups, strict=True):
        if isinstance(manager, CompressedLayerManager):
            blocks = [block.block_id for block in manager.req_to_blocks[req_id]]
            caches = [
                cpu_rows(engine.layers[name].kv_cache, engine.layers[name].head_size) for name in group.layer_names
            ]
            copies += [LayerRows(rows.keys[blocks].clone(), rows.values[blocks].clone()) for rows in caches]
    return copies


@pytest.mark.parametrize("engine_name", ["compressing", "all_layers"])
def test_an_uncompressed_neighbour_is_not_changed(engine_name, text_ids, request):
    engine = request.getfixturevalue(engine_name)
    prompt = text_ids[:460]
    alone = engine.fresh_tokens(prompt, greedy(24))

    assert engine.kv_cache_manager.reset_prefix_cache()
    neighbour = engine.add("neighbour", prompt, greedy(24))
    while engine.scheduler.requests[neighbour].num_output_tokens < 2:
        engine.step()
    before = rows_of(engine, neighbour)
    for ratio in ("0.1", "0.5", "0.9"):
        engine.add(f"keeps {ratio}", prompt, keep(ratio, num_tokens=8))
    for _ in range(6):
        engine.step()
    after = rows_of(engine, neighbour)
    for old, new in zip(before, after, strict=True):
        num_full_blocks = 460 // 32  # the last block of the prompt grows by generated tokens
        assert torch.equal(old.keys[:num_full_blocks], new.keys[:num_full_blocks])
        assert torch.equal(old.values[:num_full_blocks], new.values[:num_full_blocks])
    answers = engine.drain()
    assert list(answers["neighbour"].outputs[0].token_ids) == alone
    engine.check_whole()


def test_tokens_generated_from_a_compressed_context_are_never_shared(compressing, text_ids):
    """Their keys and values depend on the evictions; an uncompressed request must compute its own.

    Fewer rows are evicted than a block holds, so that the answer reaches the block after those of the prompt.
    """
    prompt = text_ids[:440]
    longer = prompt + compressing.fresh_tokens(prompt, keep("0.95", num_tokens=12))
    alone = compressing.fresh_tokens(longer, greedy())

    assert compressing.kv_cache_manager.reset_prefix_cache()
    compressing.generate([prompt], [keep("0.95", num_tokens=12)])
    (answer,) = compressing.generate([longer], [greedy()])
    assert answer.num_cached_tokens == 416  # of the prompt's 440, nothing generated
    assert list(answer.outputs[0].token_ids) == alone


def test_tokens_generated_from_a_full_context_are_shared_as_ever(compressing, text_ids):
    prompt = text_ids[:440]
    longer = prompt + compressing.fresh_tokens(prompt, greedy(12))
    (answer,) = compressing.generate([longer], [keep("0.5")])
    assert answer.num_cached_tokens == 448


def test_two_prompts_compacted_in_one_step_do_not_mix(compressing, text_ids):
    prompts = [text_ids[:200], text_ids[200:400]]
    alone = [compressing.fresh_tokens(prompt, keep("0.3")) for prompt in prompts]
    assert compressing.kv_cache_manager.reset_prefix_cache()
    assert compressing.tokens(prompts, [keep("0.3")] * 2) == alone
