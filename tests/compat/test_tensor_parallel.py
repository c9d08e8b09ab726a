"""Two tensor-parallel ranks in separate processes: answers and blocks equal those of one rank."""

import pytest
import torch
from engine import keep
from ranks import MixedLoad, start_profile, stop_profile
from reference import Reference, check_numbers, expected_compactions
from rules import INTERVALS
from widened import widened

RULES = [
    *({"ratio": ratio} for ratio in ("1.0", "0.5", "0.25")),
    {"ratio": "1", "budget": 60},
    {"ratio": "0.25", "budget": 80, "first": 4, "last": 16},
    {"ratio": "0.4", "document": 200},
]


@pytest.mark.parametrize(
    ("num_kv_heads", "full_layers", "full_heads"),
    [
        # 8 of 16 heads, half of them those of a layer.
        pytest.param(4, (0,), {1: (1, 2), 3: (0, 2)}, id="layer 0 and some heads full"),
        pytest.param(2, (0,), {}, id="one KV head a rank, layer 0 full", marks=pytest.mark.slow),
        pytest.param(1, (), {}, id="replicated, none full", marks=pytest.mark.slow),
        pytest.param(2, (), {}, id="one KV head a rank, none full", marks=pytest.mark.slow),
        pytest.param(1, (0,), {}, id="replicated, layer 0 full", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one(num_kv_heads, full_layers, full_heads, tiny_model, run, text_ids, unbound_threads):
    model = tiny_model("llama", num_key_value_heads=num_kv_heads)
    prompts = [text_ids[11 * i : 11 * i + 300] for i in range(len(RULES))]
    params = [keep(**rule) for rule in RULES]
    answers, blocks, by_chance = {}, {}, {}
    for num_ranks in (1, 2):
        with run(model, full_layers, full_heads=full_heads, tensor_parallel_size=num_ranks) as engine:
            outputs = engine.generate(prompts, params)
            answers[num_ranks] = [list(output.outputs[0].token_ids) for output in outputs]
            for rule, output in zip(RULES, outputs, strict=True):
                numbers = check_numbers(output, intervals=INTERVALS, **rule)
                assert (numbers["compactions"] > 2) is ("budget" in rule)
            by_chance[num_ranks] = engine.tokens(prompts[:2], [keep("0.25", scorer="random")] * 2)
            held = blocks[num_ranks] = []
            for i, prompt in enumerate(prompts):
                req_id = engine.add(str(i), prompt, params[i])
                while engine.scheduler.requests[req_id].num_output_tokens < 3:
                    engine.step()
                held.append(engine.num_blocks(req_id))
                again = engine.drain()[str(i)]
                # It continued after the document, or from the last compaction in the prompt.
                assert list(again.outputs[0].token_ids) == answers[num_ranks][i]
                found = max(expected_compactions(300, 299, intervals=INTERVALS, **RULES[i]), default=0)
                assert check_numbers(again, intervals=INTERVALS, **RULES[i]).get("found_tokens", 0) == found
            engine.check_whole()
    reference = Reference(model, full_heads=full_heads)
    rules = [{**rule, "full_layers": full_layers, "intervals": INTERVALS} for rule in RULES]
    expected = [reference.generate(prompt, 12, **rule) for prompt, rule in zip(prompts, rules, strict=True)]
    assert answers == {1: expected, 2: expected}
    assert by_chance[1] == by_chance[2], "chance goes by heads of the model"
    assert blocks[1] == blocks[2]
    compressed = [of_request[-1] for of_request in blocks[1]]
    assert compressed == [10, 5, 3, 2, 3, 6]  # of 32 tokens, for 300, 150, 75, 60, 75 and 180, and two more


@pytest.mark.slow
def test_many_requests_on_two_ranks_with_equal_state(tiny_model, run, text_ids, unbound_threads):
    model = tiny_model("llama", num_key_value_heads=2)
    load = MixedLoad(text_ids, RULES)
    room = {"max_num_seqs": load.num_requests, "max_num_batched_tokens": 8192, "num_gpu_blocks_override": 3000}
    with run(model, (0,), tensor_parallel_size=2, **room) as engine:
        load.run(engine)
    assert load.looks["requests"] > 100, load.looks
    assert load.looks["compacted"] > 50, load.looks
    assert load.looks["aborted"] > 10, load.looks
    assert load.looks["found documents"] > 2, load.looks
    assert load.looks["found conversations"] > 2, load.looks
    reference = Reference(model)
    for number, (prompt, rule) in enumerate(zip(load.prompts, load.chosen, strict=True)):
        if str(number) not in load.aborted:
            expected = reference.generate(prompt, 12, full_layers=(0,), intervals=INTERVALS, **rule)
            assert load.answers[str(number)] == expected, f"{len(prompt)} tokens, {rule}"


@pytest.mark.slow
def test_compaction_adds_no_communication(tiny_model, run, text_ids, unbound_threads):
    model = tiny_model("llama", num_key_value_heads=2)
    prompts = [text_ids[11 * i : 11 * i + 300] for i in range(4)]
    profiles = {}
    for full_layers in (None, (0,)):
        with run(model, full_layers, tensor_parallel_size=2) as engine:
            engine.llm.collective_rpc(start_profile)
            params = [keep("0.5")] * 3 + [keep("1", budget=200)] if full_layers else [keep("1")] * len(prompts)
            outputs = engine.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
            profiles[full_layers] = engine.llm.collective_rpc(stop_profile)
            if full_layers:
                compactions = [output.kv_transfer_params["kv_cache"]["compactions"] for output in outputs]
                assert compactions == [1, 1, 1, 4]
    stock, ours = profiles[None], profiles[(0,)]
    assert sum(stock[0].values()) > 12, stock  # at least one for each token
    assert ours == stock


@pytest.mark.slow
def test_a_fourth_kv_head_changes_nothing(demo_model, reference, tmp_path, text_ids):
    """`tests/gpu/test_two_gpus.py` divides the demo model's heads between two GPUs this way."""
    wide = Reference(widened(tmp_path / "widened", demo_model))
    assert wide.model.config.num_key_value_heads == reference.model.config.num_key_value_heads + 1
    prompt, ratio = text_ids[:100], "0.5"
    tokens = reference.generate(prompt, 8, ratio)
    torch.testing.assert_close(wide.logits(prompt, tokens, ratio), reference.logits(prompt, tokens, ratio))
