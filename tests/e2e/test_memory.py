"""Blocks that requests hold, and requests that use the freed ones."""

from engine import greedy, keep
from reference import expected_keep

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.messages.usage import KeptWhole


def test_block_sizes_of_the_two_groups(compressing):
    assert [(type(manager).__name__, manager.block_size) for manager in compressing.managers] == [
        ("FullLayerManager", 448),  # 32 tokens * 28 compressed layers / 2 full layers
        ("CompressedLayerManager", 32),
    ]


def test_both_groups_fill_the_pool_without_waste(compressing, all_layers):
    one_group = all_layers.num_usable_blocks * 32 * 30  # slots times layers
    two_groups = compressing.num_usable_blocks * 32 * 28
    assert two_groups > 0.99 * one_group


def test_a_request_holds_exactly_the_blocks_of_the_formula(compressing, text_ids):
    n, num_tokens = 1000, 70
    assert compressing.kv_cache_manager.reset_prefix_cache()
    req_id = compressing.add("r", text_ids[:n], keep("0.5", num_tokens=num_tokens))
    evicted, seen = 0, set()
    while compressing.llm.llm_engine.has_unfinished_requests():
        compressing.step()
        request = compressing.scheduler.requests.get(req_id)
        if request is None:
            break
        if request.num_output_tokens > 1:  # the first token comes from the full cache
            evicted = n - expected_keep(n, "0.5")
        computed = request.num_computed_tokens
        expected = [num_blocks_for(computed, 448), num_blocks_for(computed - evicted, 32)]
        assert compressing.num_blocks(req_id) == expected, f"{computed} computed tokens"
        seen.add(tuple(expected))
    # Two chunks of prefill, then compacted, then growing past block boundaries.
    assert {(2, 16), (3, 32), (3, 16), (3, 17), (3, 18)} <= seen
    compressing.check_whole()


def test_one_group_holds_exactly_the_blocks_of_the_formula(all_layers, text_ids):
    req_id = all_layers.add("r", text_ids[:300], keep("0.1", num_tokens=5))
    all_layers.step()
    assert all_layers.num_blocks(req_id) == [num_blocks_for(300, 32)]
    all_layers.step()
    assert all_layers.num_blocks(req_id) == [num_blocks_for(30 + 1, 32)]
    all_layers.drain()
    all_layers.check_whole()


def test_the_numbers_that_a_client_gets(compressing, text_ids):
    prompt = text_ids[:333]
    params = [keep("0.5"), keep("1.0"), keep("0.5", num_tokens=1), keep("0.5", 200, 100), greedy()]
    asked, everything, one_token, protected, nothing = compressing.generate([prompt] * 5, params)
    assert asked.kv_transfer_params == {
        # The last of 12 tokens is not computed.
        "kv_cache": {
            "prompt_tokens": 333,
            "kept_tokens": 167 + 11,
            "evicted_tokens": 166,
            "compactions": 1,
            "memory_ratio": 0.5496,  # (2 * 344 + 28 * 178) / (30 * 344)
        }
    }
    assert everything.kv_transfer_params == {
        "kv_cache": {
            "prompt_tokens": 333,
            "kept_tokens": 344,
            "evicted_tokens": 0,
            "compactions": 0,
            "memory_ratio": 1.0,
        }
    }
    # The only token comes from the full cache, so nothing is ever evicted.
    assert one_token.kv_transfer_params["kv_cache"] == {
        "prompt_tokens": 333,
        "kept_tokens": 333,
        "evicted_tokens": 0,
        "compactions": 0,
        "memory_ratio": 1.0,
        "reason": KeptWhole.FIRST_TOKEN,
    }
    assert protected.kv_transfer_params["kv_cache"]["kept_tokens"] == 300 + 11
    assert nothing.kv_transfer_params is None


def peak_running(engine, prompts, ratio) -> int:
    for i, prompt in enumerate(prompts):
        engine.add(f"{ratio}-{i}", prompt, keep(ratio, num_tokens=24))
    peak = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        peak = max(peak, len(engine.scheduler.running))
    return peak


def test_a_small_cache_runs_more_requests_at_once_when_compressed(compressing, text_ids):
    prompts = [text_ids[40 * i : 40 * i + 200] for i in range(12)]
    with compressing.pool_of(42):
        full = peak_running(compressing, prompts, "1.0")
    with compressing.pool_of(42):
        quarter = peak_running(compressing, prompts, "0.25")
    # A request needs 1 + 7 blocks uncompressed, 1 + 2 or 3 at a quarter, and 1 + 7 briefly when it begins.
    assert full <= 5
    assert quarter >= 2 * full
    compressing.check_whole()
