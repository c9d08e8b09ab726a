"""Decoding requests get their slots by a fast path, which must not change anything else."""

import random

import pytest

from vllm_l2kv.scheduler.decode_fast_path import DecodeFastPath, with_decode_fast_path


def submit_all(harness) -> None:
    chance = random.Random(0)
    for i in range(12):
        prompt = [chance.randrange(3)] * 40 + [chance.randrange(1000) for _ in range(chance.randrange(200))]
        harness.submit(f"{i}", prompt, {"kv_keep_ratio": chance.choice([1.0, 0.5, 0.2])}, chance.randrange(1, 150))


def seen_in(step):
    cached = step.scheduled_cached_reqs
    new = [(request.req_id, request.block_ids, request.num_computed_tokens) for request in step.scheduled_new_reqs]
    return new, dict(zip(cached.req_ids, cached.new_block_ids, strict=True)), step.num_scheduled_tokens


@pytest.mark.parametrize("num_blocks", [40, 400])  # the smaller pool causes preemptions
@pytest.mark.parametrize("depth", [1, 2])
def test_steps_and_prefix_cache_equal_those_of_the_slow_path(make_harness, num_blocks, depth):
    short, long = (make_harness(num_blocks, full_layers=(0,), depth=depth) for _ in range(2))
    assert isinstance(short.scheduler.kv_cache_manager, DecodeFastPath)
    long.scheduler.kv_cache_manager = long.scheduler.kv_cache_manager.manager
    for harness in (short, long):
        submit_all(harness)
        harness.run()
    assert [seen_in(step) for step in short.steps] == [seen_in(step) for step in long.steps]
    findable = [h.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block._cache for h in (short, long)]
    assert findable[0].keys() == findable[1].keys() != set()


def test_a_decoding_request_takes_it(make_harness, monkeypatch):
    harness = make_harness(200, full_layers=(0,))
    harness.add("a", 20, max_tokens=40)
    shortcut = harness.scheduler.kv_cache_manager
    asked = []
    long_way = shortcut.manager.allocate_slots

    def count(*args, **kwargs):
        asked.append(args)
        return long_way(*args, **kwargs)

    monkeypatch.setattr(shortcut.manager, "allocate_slots", count)
    harness.run()
    # The slow path at the prefill, then whenever a block of 16 tokens is full or becomes findable.
    assert len(harness.steps) >= 40
    assert 3 <= len(asked) <= 10


def test_other_layers_disable_it(make_harness):
    manager = make_harness(200, full_layers=(0,)).scheduler.kv_cache_manager.manager
    manager.coordinator.single_type_managers = (*manager.coordinator.single_type_managers, object())
    assert with_decode_fast_path(manager) is manager
