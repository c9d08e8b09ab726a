"""A request that the cache can hold is served, and one that it cannot hold is refused: none waits for ever."""

from dataclasses import replace

import pytest
from usages import usage

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.scheduler.integrity import check_nothing_left


@pytest.fixture(params=[1, 2], ids=["sync", "async"])
def depth(request) -> int:
    return request.param


def set_intervals(harness, prompt: int, answer: int) -> None:
    scheduler = harness.scheduler
    scheduler.settings = replace(scheduler.settings, prompt_interval=prompt, answer_interval=answer)


def alone(harness, num_prompt_tokens: int, max_tokens: int, fields: dict, preempt_at: int | None = None) -> str:
    """Runs a request alone in a cache with its prompt, and preempts it in its answer; returns how it finished."""
    prompt = list(range(num_prompt_tokens))
    harness.submit("before", prompt, {}, 1)
    harness.run(3000)
    request = harness.submit("r", prompt, fields, max_tokens)
    if preempt_at is not None:
        harness.run_until(lambda: request.is_finished() or request.num_output_tokens >= preempt_at, 3000)
        harness.scheduler.reset_prefix_cache(reset_running_requests=True)
    harness.run(3000)
    check_nothing_left(harness.scheduler)
    if harness.finish_reasons["r"] == "length":
        assert len(harness.outputs["r"]) == request.max_tokens
    return harness.finish_reasons["r"]


def test_a_request_of_the_whole_cache_that_begins_inside_a_block(make_harness):
    """vLLM needs a block for the copy of the block that it begins in, in addition to the request's own blocks."""
    assert alone(make_harness(9), 100, 8, {}) == "length"


def test_a_request_of_the_whole_cache_is_preempted_in_its_answer(make_harness):
    """A short prompt never holds the prompt's interval, so it needs no room for it."""
    harness = make_harness(4, full_layers=())
    set_intervals(harness, 512, 16)
    assert alone(harness, 40, 300, {"kv_max_tokens": 32}, preempt_at=100) == "length"


def test_full_layers_hold_most_when_compressed_ones_do_not(make_harness):
    """264 rows at position 264 and 330 tokens at the end: 22 blocks at a time, 23 as vLLM counts."""
    for num_blocks, reason in ((22, "error"), (23, "length")):
        harness = make_harness(num_blocks)
        set_intervals(harness, 200, 16)
        assert alone(harness, 330, 8, {"kv_max_tokens": 64}) == reason


def test_many_requests_whose_full_caches_would_need_ten_pools(make_harness, depth):
    """64 requests, half of them with one prompt; the oldest is never preempted."""
    harness = make_harness(100, depth=depth)
    set_intervals(harness, 16, 96)
    for i in range(64):
        prompt = [1] * 200 if i % 2 else list(range(1000 * i, 1000 * i + 150 + i))
        harness.submit(f"{i}", prompt, {"kv_max_tokens": 48 + i % 7}, 120)
    needed = sum(num_blocks_for(request.num_tokens + 119, 16) for request in harness.scheduler.requests.values())
    assert needed > 10 * 100
    harness.run(5000)
    assert harness.preempted()
    assert "0" not in harness.preempted()
    assert {len(tokens) for tokens in harness.outputs.values()} == {120}
    assert len(harness.outputs) == 64
    assert harness.usage["0"] == usage(150, 120, evicted=192, compactions=7)


def test_blocks_that_a_compaction_has_freed_are_needed_again(make_harness):
    """Three requests hold 64 to 128 rows each, in at most 24 of 25 blocks: a fourth would be preempted."""
    harness = make_harness(25, full_layers=())
    set_intervals(harness, 64, 64)
    for req_id in "abc":
        harness.add(req_id, 64, 320, kv_max_tokens=64, kv_protect_last=16)
    harness.run_until(lambda: len(harness.compressed.num_evicted) == 3)
    harness.add("late", 64, 320, kv_max_tokens=64, kv_protect_last=16)
    harness.run(3000)
    assert {req_id: len(tokens) for req_id, tokens in harness.outputs.items()} == dict.fromkeys([*"abc", "late"], 320)
    assert harness.preempted() == []
    check_nothing_left(harness.scheduler)
