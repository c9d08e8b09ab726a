"""Invariants of a scheduler between two steps. For tests, and for debugging a running engine."""

from collections import Counter
from collections.abc import Collection, Iterable

from vllm.v1.core.kv_cache_manager import KVCacheManager

from vllm_l2kv.scheduler.cache_manager import CompressedLayerManager, TailManager
from vllm_l2kv.scheduler.scheduler import L2KVScheduler


def compressed_managers(scheduler: L2KVScheduler) -> list[CompressedLayerManager]:
    """The managers of compressed layers, one for each compressed KV-cache group."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return [manager for manager in managers if isinstance(manager, CompressedLayerManager)]


def num_evicted(scheduler: L2KVScheduler, req_id: str) -> int:
    """Evicted tokens of a request; 0 if it has not been compacted.

    Raises:
        AssertionError: The managers of the groups disagree.
    """
    (count,) = {manager.num_evicted.get(req_id, 0) for manager in compressed_managers(scheduler)}
    return count


def check_requests(scheduler: L2KVScheduler) -> None:
    """Checks that the state of each request is kept exactly until it finishes, and that no compaction is missed.

    Raises:
        AssertionError: A request is kept too long, or a compaction is missed; the message names the request.
    """
    # Requests that finished since the last step are forgotten in the next one.
    unfinished = {*scheduler.requests, *scheduler.finished_req_ids}
    assert set(scheduler._next) <= set(scheduler._states), "a request that is to be compacted is not known"
    remembered: list[Iterable[str]] = [scheduler._states]
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        remembered.append(manager.num_cached_block)
        if isinstance(manager, TailManager):
            remembered += [manager.compacted_hits, manager.held]
    for manager in compressed_managers(scheduler):
        remembered += [manager.num_evicted, manager.max_rows, manager.num_tokens_allocated, manager.next_cacheable]
        remembered.append(manager.compacted_hits)
    for known in remembered:
        assert not set(known) - unfinished, f"{min(set(known) - unfinished)} is finished and still known"
    for request in scheduler.running:
        req_id, state = request.request_id, scheduler._states.get(request.request_id)
        points = None if state is None else state.points
        coming = scheduler._next.get(req_id)
        evicted = num_evicted(scheduler, req_id)
        if points is None:
            assert (coming, evicted) == (None, 0), f"{req_id} is to be kept whole"
            continue
        last = next((past for past in points.until(request.num_computed_tokens) if past.num_evicted == evicted), None)
        assert (last is None) == (evicted == 0), f"{req_id} has evicted {evicted} tokens"
        assert coming == points.after(last), f"{req_id} is passed over"
        assert coming is None or request.num_computed_tokens <= coming.position, f"{req_id} has run past {coming}"


def check_nothing_left(scheduler: L2KVScheduler, others: Collection[int] = ()) -> None:
    """Checks that an idle scheduler keeps no state of requests and holds no block.

    Call it after the step in which the worker learns which requests have finished.

    Args:
        scheduler: The scheduler to check.
        others: As for `check_block_conservation`.

    Raises:
        AssertionError: State or blocks are left; the message names them.
    """
    assert not scheduler.requests, f"{min(scheduler.requests)} is unfinished"
    assert not scheduler.finished_req_ids, "the worker does not know yet what has finished"
    check_requests(scheduler)
    check_block_conservation(scheduler.kv_cache_manager, others)
    pool = scheduler.kv_cache_manager.block_pool
    num_held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks() - len(set(others))  # one is vLLM's null block
    assert num_held == 0, f"{num_held} blocks are held"


def check_block_conservation(kv_cache_manager: KVCacheManager, others: Iterable[int] = ()) -> None:
    """Checks that every block is either free, or in as many block tables as its reference count says.

    Call it between steps, when no copy-on-write is in progress.

    Args:
        kv_cache_manager: vLLM's manager.
        others: Ids of blocks that a KV connector holds, repeated for each reference.

    Raises:
        AssertionError: A block is lost or counted twice; the message names it.
    """
    pool = kv_cache_manager.block_pool
    managers = kv_cache_manager.coordinator.single_type_managers
    tables = [(manager, req_id, blocks) for manager in managers for req_id, blocks in manager.req_to_blocks.items()]
    holders = Counter(block.block_id for _, _, blocks in tables for block in blocks if not block.is_null)
    tails = [manager for manager in managers if isinstance(manager, TailManager)]
    holders.update(block.block_id for tail in tails for blocks in tail.held.values() for block in blocks)
    holders.update(others)
    free = Counter(block.block_id for block in pool.free_block_queue.get_all_free_blocks())
    assert pool.free_block_queue.num_free_blocks == sum(free.values()), "the free list has lost count"
    for block in pool.blocks:
        if block.is_null:
            continue
        held = holders[block.block_id]
        assert block.ref_cnt == held, f"block {block.block_id} counts {block.ref_cnt} holders, {held} tables hold it"
        assert free[block.block_id] == (held == 0), (
            f"block {block.block_id}: {held} holders, {free[block.block_id]} free"
        )
