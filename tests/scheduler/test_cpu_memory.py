"""Documents and prompts in CPU memory, by vLLM's own connector with a made-up worker."""

import pytest
from cpu_copies import Copies, pinned
from test_shared_prefixes import DOCUMENT, WHOLE, ask, copy_of, fields, found
from vllm.v1.request import RequestStatus

from vllm_l2kv import refusals
from vllm_l2kv.messages.orders import compacted_hits_of, orders_of
from vllm_l2kv.scheduler.integrity import check_nothing_left


@pytest.fixture(autouse=True)
def _opened(monkeypatch):
    monkeypatch.setitem(refusals.CONNECTORS, "CPUs", ("SimpleCPUOffloadConnector",))


@pytest.fixture
def make(make_harness):
    """Blocks have 64 tokens in the one full layer, 16 in the four others."""

    def make(num_blocks=100, depth=1, lag=1, cpu_blocks=200, **arguments):
        harness = make_harness(num_blocks, depth=depth, cpu_blocks=cpu_blocks, **arguments)
        harness.copies = Copies(lag=lag)
        harness.transfer = harness.copies.transfer
        return harness

    return make


def fill(harness) -> None:
    """Evicts everything from the GPU's pool, as slowly as requests do: the connector stores the blocks reused next."""
    pool, tables = harness.pool, harness.compressed.req_to_blocks
    while pool.get_num_free_blocks():
        tables["another holder"] += pool.get_new_blocks(min(3, pool.get_num_free_blocks()))
        for _ in range(harness.copies.lag + harness.depth + 1):
            harness.step()
    while harness.in_flight:
        harness.finish_one()
    pool.free_blocks(tables.pop("another holder"))


def begin_of(harness, req_id: str, prompt, asked) -> int:
    """Returns the tokens that a request has when it begins to compute."""
    num_steps = len(harness.steps)
    harness.submit(req_id, prompt, asked, 4)
    harness.run()
    (begin,) = [step for step in harness.steps[num_steps:] if step.scheduled_new_reqs]
    return begin.scheduled_new_reqs[0].num_computed_tokens


def is_loading(harness, req_id: str) -> bool:
    return harness.scheduler.requests[req_id].status == RequestStatus.WAITING_FOR_REMOTE_KVS


@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_document_is_found_in_cpu_memory(make, depth, lag):
    harness = make(depth=depth, lag=lag)
    assert found(harness, "first") == 0
    assert found(harness, "second") == 100
    fill(harness)
    assert harness.copies.num_loaded == 0
    num_steps = len(harness.steps)
    assert found(harness, "third") == 100
    assert harness.copies.num_loaded == 4 + 2
    (begin,) = [step for step in harness.steps[num_steps:] if step.scheduled_new_reqs]
    assert begin.scheduled_new_reqs[0].num_computed_tokens == 100
    assert begin.num_scheduled_tokens["third"] == 10
    assert compacted_hits_of(begin) == {"third": 50}
    assert found(harness, "fourth") == 100
    assert harness.copies.num_loaded == 6
    check_nothing_left(harness.scheduler)


def test_the_whole_of_a_prompt_is_found_up_to_its_first_compaction(make):
    """Blocks of both layers end at every 64th token. A hit ends before the document does."""
    harness, prompt = make(), [*DOCUMENT, *range(700, 900)]
    for asked, begin in ((WHOLE, 0), (WHOLE, 256), (fields(), 64)):
        assert begin_of(harness, f"from {begin}", prompt, asked) == begin
        fill(harness)
    assert harness.usage["from 64"]["evicted_tokens"] == 50


def test_a_prompt_that_is_compacted_at_its_end_is_found(make):
    harness, prompt = make(), [*DOCUMENT, *range(700, 730)]
    for begin in (0, 128):
        assert begin_of(harness, f"from {begin}", prompt, {"kv_keep_ratio": 0.5}) == begin
        fill(harness)
    assert harness.usage["from 0"] == harness.usage["from 128"]


def test_others_wait_for_a_load_and_share_it(make):
    harness = make(lag=4)
    found(harness, "first")
    fill(harness)
    for req_id in ("second", "third"):
        ask(harness, req_id)
    harness.submit("stranger", [7] * 20, None, 2)
    harness.step()
    harness.step()
    assert is_loading(harness, "second")
    assert not is_loading(harness, "third")
    assert harness.outputs["stranger"], "it does not wait"
    harness.run()
    assert harness.copies.num_loaded == 6
    assert [harness.usage[req_id]["found_tokens"] for req_id in ("second", "third")] == [100, 100]


def test_a_load_that_is_aborted_is_done_again_by_the_next(make):
    harness = make(lag=4)
    found(harness, "first")
    fill(harness)
    for req_id in ("second", "third"):
        ask(harness, req_id)
    harness.step()
    harness.scheduler.finish_requests("second", RequestStatus.FINISHED_ABORTED)
    harness.run()
    assert harness.copies.num_loaded == 12
    assert harness.usage["third"]["found_tokens"] == 100
    check_nothing_left(harness.scheduler)


def test_a_new_copy_takes_the_place_of_the_one_in_cpu_memory(make):
    """Rows of two copies may differ if rounding decided: blocks of both must never be loaded together."""
    harness = make()
    ask(harness, "first")
    (prefix,) = harness.scheduler._states["first"].prefixes.to_publish
    harness.run()
    memory, shared = harness.scheduler._cpu_memory, harness.scheduler._shared
    fill(harness)
    old = shared.blocks_of(prefix, memory._pool)
    memory._pool.evict_blocks({old[1][1].block_id})
    assert found(harness, "second") == 0
    harness.step()
    harness.step()
    new = shared.blocks_of(prefix, memory._pool)
    assert not {block.block_id for block in old[1]} & {block.block_id for block in new[1]}
    assert not any(block.block_hash for block in old[1])


def test_a_copy_that_is_being_stored_is_not_forgotten(make):
    """The connector reads the hashes of blocks after they are stored, and would end the engine without them."""
    harness = make(lag=12)
    ask(harness, "first")
    state = harness.scheduler._states["first"]
    harness.run_until(lambda: harness.copies.is_busy)
    compressed = copy_of(harness, state)[harness.compressed.kv_cache_group_id]
    (lost, *left) = [block.block_id for block in compressed]
    transfer = next(iter(harness.scheduler._cpu_memory._manager._store_event_to_blocks.values()))
    at = transfer.gpu_block_ids.index(lost)
    del transfer.gpu_block_ids[at], transfer.cpu_block_ids[at]
    harness.pool.free_blocks([harness.pool.blocks[lost]])
    harness.pool.evict_blocks({lost})  # as if the block had been stored, freed and reused before the others
    assert found(harness, "second") == 0
    assert all(harness.pool.blocks[block_id].block_hash for block_id in left)


def test_superseded_blocks_are_not_stored(make):
    """Whole blocks of a document are less useful than its compacted ones, and four times as many."""
    harness = make()
    found(harness, "first")
    superseded = set(harness.scheduler._superseded._hashes)
    assert len(superseded) == 6
    harness.scheduler._superseded.reuse_first(harness.pool.get_num_free_blocks())
    assert not any(harness.pool.blocks[block_id].block_hash for block_id in superseded)


def test_a_longer_prefix_in_cpu_memory_is_preferred(make):
    harness = make(prompt_interval=32, answer_interval=16)
    budget = {"kv_max_tokens": 64, "kv_protect_first": 0, "kv_protect_last": 0}
    harness.submit("long", list(range(200)), budget, 4)  # compacted at 96, 128, 160, 192
    harness.run()
    fill(harness)
    harness.submit("short", list(range(150)), budget, 4)
    harness.run()
    num_loaded = harness.copies.num_loaded
    harness.submit("again", list(range(210)), budget, 4)
    harness.run()
    assert "found_tokens" not in harness.usage["short"]
    assert harness.usage["again"]["found_tokens"] == 192
    assert harness.copies.num_loaded > num_loaded


def test_cpu_memory_smaller_than_the_cache_is_refused(make):
    with pytest.raises(ValueError, match="must hold at least the 101 blocks of the GPU's KV cache, got 50;"):
        make(cpu_blocks=50)


def test_offloading_does_nothing_unless_requested(make):
    harness = make()
    found(harness, "first")
    fill(harness)
    assert found(harness, "second", skip_reading_prefix_cache=True) == 0
    assert harness.copies.num_loaded == 0
    harness.submit("whole", [*DOCUMENT, 1], WHOLE, 1)
    harness.run()
    assert not orders_of(harness.steps[-1])
    assert not pinned(harness.scheduler)
