"""The cache as a consumer of KV events sees it, compared with the pool."""

import random
from collections import Counter

import pytest
from vllm.distributed.kv_events import AllBlocksCleared, BlockStored
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id, maybe_convert_block_hash
from vllm.v1.request import RequestStatus


class Consumer:
    """Counts blocks by group and hash, from events alone, and keeps the tokens of each hash."""

    def __init__(self, harness) -> None:
        self.harness = harness
        self.stored: Counter[tuple[int, object]] = Counter()
        self.prefixes: dict[object, tuple[int, ...]] = {None: ()}
        self.num_events: Counter[str] = Counter()
        self.compressed: set[object] = set()  # hashes of blocks of compacted prefixes
        harness.scheduler.kv_event_publisher.publish = self.take

    def take(self, batch) -> None:
        for event in batch.events:
            self.num_events[type(event).__name__] += 1
            if isinstance(event, AllBlocksCleared):
                self.stored.clear()
                continue
            assert event.medium == "GPU"
            for block_hash in event.block_hashes:
                key = event.group_idx, block_hash
                self.stored[key] += 1 if isinstance(event, BlockStored) else -1
                assert self.stored[key] >= 0, f"{key} was removed and never stored"
            if isinstance(event, BlockStored):
                self._follow(event)

    def _follow(self, event) -> None:
        """Checks that every stored block continues one that the consumer knows.

        Consumers match prompts by tokens and extra keys, and no prompt has the extra key of compressed rows.
        """
        assert event.kv_cache_spec_kind
        assert len(event.token_ids) == len(event.block_hashes) * event.block_size
        assert len(event.extra_keys) == len(event.block_hashes)
        prefix = self.prefixes[event.parent_block_hash]
        if event.block_size == 1:
            (name,) = {keys[-1] for keys in event.extra_keys}
            assert len(name) == 64
            self.compressed.update(event.block_hashes)
            return
        assert set(event.extra_keys) == {None}
        for i, block_hash in enumerate(event.block_hashes):
            prefix += tuple(event.token_ids[i * event.block_size : (i + 1) * event.block_size])
            assert self.prefixes.setdefault(block_hash, prefix) == prefix

    def check(self) -> None:
        self.take(Batch(self.harness.scheduler.kv_cache_manager.take_events()))
        assert +self.stored == in_pool(self.harness.pool)


class Batch:
    def __init__(self, events) -> None:
        self.events = events


def in_pool(pool) -> Counter:
    """Returns the blocks that the prefix cache can find, by group and hash."""
    blocks: Counter = Counter()
    for key, found in pool.cached_block_hash_to_block._cache.items():
        name = get_group_id(key), maybe_convert_block_hash(get_block_hash(key))
        blocks[name] += len(found) if isinstance(found, dict) else 1
    return blocks


@pytest.mark.parametrize("full_layers", [(0,), ()], ids=["blocks of two sizes", "one size"])
@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(4))
def test_a_consumer_knows_what_is_cached(make_harness, full_layers, depth, seed):
    sizes = {"num_layers": 5, "block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 6, "max_model_len": 128}
    harness = make_harness(30, full_layers, depth, kv_events=True, **sizes)
    consumer = Consumer(harness)
    rng = random.Random(seed)
    for i in range(120):
        if rng.random() < 0.5:
            prompt = [rng.randint(1, 2)] * rng.randint(1, 60) + [3 + rng.randint(0, 1)] * rng.randint(1, 10)
            fields = {"kv_keep_ratio": rng.choice([1.0, 0.5, 0.1])} if rng.random() < 0.7 else {}
            if rng.random() < 0.4 and len(prompt) > 25:
                fields |= {"kv_prefix_tokens": 25, "kv_protect_last": 0, "kv_keep_ratio": 0.5}
            harness.submit(f"r{i}", prompt, fields, rng.randint(1, 30))
        if rng.random() < 0.1 and harness.scheduler.requests:
            gone = rng.choice(sorted(harness.scheduler.requests))
            harness.scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
        if rng.random() < 0.03:
            harness.scheduler.reset_prefix_cache(reset_running_requests=True)
        harness.step()
        consumer.check()
    harness.run()
    consumer.check()
    assert harness.scheduler.reset_prefix_cache()
    consumer.check()
    assert not +consumer.stored
    assert len(consumer.compressed) >= 8
    assert consumer.num_events["BlockStored"] > 100
    assert consumer.num_events["BlockRemoved"] > 50


@pytest.mark.parametrize("num_shared", [5, 17, 33, 43])
def test_a_report_of_what_a_request_found(make_harness, num_shared):
    """vLLM's field `kv_cache_report_mode` requests it; a hit may end inside a block."""
    harness = make_harness(
        60, (0,), num_layers=5, block_size=4, max_num_batched_tokens=256, max_model_len=128, kv_events=True
    )
    harness.submit("first", [1] * 45, {}, 4)
    harness.run()
    harness.scheduler.kv_cache_manager.take_events()
    cached = in_pool(harness.pool)
    second = harness.submit("second", [1] * num_shared + [2] * 3, {"kv_cache_report_mode": "full"}, 1)
    (new,) = harness.schedule().scheduled_new_reqs
    events = harness.scheduler.kv_cache_manager.take_events()
    num_hit = new.num_computed_tokens
    assert num_hit == num_shared // 4 * 4
    found = {
        (manager.kv_cache_group_id, maybe_convert_block_hash(second.block_hashes[end // 4 - 1]))
        for manager in harness.scheduler.kv_cache_manager.coordinator.single_type_managers
        for end in range(4, num_hit + 1, 4)
        if end % manager.block_size == 0 or end > num_hit // manager.block_size * manager.block_size
    }
    reported = {(event.group_idx, block_hash) for event in events for block_hash in event.block_hashes}
    assert found <= reported & set(cached)
    assert reported <= set(in_pool(harness.pool))
    harness.finish_one()
    assert harness.outputs["second"] == [7]


def test_a_report_of_a_compressed_document(make_harness):
    """A request that finds a document reports its blocks in each group."""
    sizes = {"num_layers": 5, "block_size": 4, "max_num_batched_tokens": 256, "max_model_len": 128, "kv_events": True}
    harness = make_harness(60, (0,), **sizes)
    fields = {"kv_prefix_tokens": 30, "kv_keep_ratio": 0.5, "kv_protect_first": 0, "kv_protect_last": 0}
    harness.submit("first", [1] * 31, fields, 4)
    harness.run()
    harness.scheduler.kv_cache_manager.take_events()
    harness.submit("second", [1] * 30 + [2], {"kv_cache_report_mode": "full", **fields}, 1)
    (new,) = harness.schedule().scheduled_new_reqs
    assert new.num_computed_tokens == 30
    reported = [event for event in harness.scheduler.kv_cache_manager.take_events() if event.block_size == 1]
    # Fifteen rows in blocks of 4 tokens, and 30 tokens in blocks of 16.
    assert [(event.group_idx, len(event.block_hashes)) for event in reported] == [(0, 2), (1, 4)]
    assert {(event.group_idx, name) for event in reported for name in event.block_hashes} <= set(in_pool(harness.pool))
    harness.finish_one()
