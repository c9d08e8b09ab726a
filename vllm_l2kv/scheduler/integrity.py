"""The block-conservation check: every block in exactly one place. For tests and for debugging a live scheduler."""

from collections import Counter

from vllm.v1.core.kv_cache_manager import KVCacheManager

from vllm_l2kv.scheduler.cache_manager import CompressedLayerManager


def check_block_conservation(kv_cache_manager: KVCacheManager) -> None:
    """Checks that every block is free or held as often as it is counted, and that no compacted block is shared.

    Call it between steps, when no copy-on-write is under way.

    Raises:
        AssertionError: Names the first block that is lost, doubled or shared.
    """
    pool = kv_cache_manager.block_pool
    managers = kv_cache_manager.coordinator.single_type_managers
    tables = [(manager, req_id, blocks) for manager in managers for req_id, blocks in manager.req_to_blocks.items()]
    holders = Counter(block.block_id for _, _, blocks in tables for block in blocks if not block.is_null)
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
    for manager, req_id, blocks in tables:
        if isinstance(manager, CompressedLayerManager) and req_id in manager.num_evicted:
            for block in blocks:
                assert block.ref_cnt == 1, f"block {block.block_id} of compacted request {req_id} is shared"
                assert block.block_hash is None, f"block {block.block_id} of compacted request {req_id} is findable"
