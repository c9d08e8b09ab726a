"""Full blocks of prompts whose compacted prefix is findable: reused before all other findable blocks."""

from collections.abc import Iterable

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock


class SupersededBlocks:
    """Blocks that serve only requests with the same prompt and other parameters.

    vLLM first reuses blocks that no prompt can find, then the others in the order in which they were freed. The full
    blocks of a document are many times its compacted ones, and as young, so they would drive other documents out.

    Args:
        pool: vLLM's. It asks here whenever it gives blocks away.
        is_offloading: Whether a KV connector stores blocks that are about to be reused. These are not worth it.
    """

    def __init__(self, pool: BlockPool, is_offloading: bool = False) -> None:
        self._pool = pool
        self._is_offloading = is_offloading
        # To the hash under which it was findable; the first is reused first. Several requests may free the same.
        self._hashes: dict[int, BlockHashWithGroupId] = {}
        self._get_new_blocks = pool.get_new_blocks
        pool.get_new_blocks = self.get_new_blocks

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Same contract as the pool's."""
        if self._hashes:
            self.reuse_first(num_blocks)
        return self._get_new_blocks(num_blocks)

    def free(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Returns blocks to the pool. While it has enough blocks that no prompt can find, they are like any others.

        Args:
            blocks: The first is reused first.
        """
        blocks = list(blocks)
        self._pool.free_blocks(blocks)
        self._hashes |= {block.block_id: block.block_hash for block in blocks if block.block_hash is not None}

    def reuse_first(self, num_blocks: int) -> None:
        """Puts them before all other findable blocks, if one of the next `num_blocks` that are reused is findable."""
        if not self.would_evict(num_blocks):
            return
        # Meanwhile some may have been reused, or found and held.
        blocks = ((self._pool.blocks[block_id], block_hash) for block_id, block_hash in self._hashes.items())
        free = [block for block, block_hash in blocks if block.ref_cnt == 0 and block.block_hash == block_hash]
        queue = self._pool.free_block_queue
        for block in free:
            queue.remove(block)
        queue.prepend_n(free)
        self._hashes = {}
        if self._is_offloading:
            self._pool.evict_blocks({block.block_id for block in free})

    def would_evict(self, num_blocks: int) -> bool:
        """Whether one of the next `num_blocks` that are reused is findable."""
        block = self._pool.free_block_queue.fake_free_list_head.next_free_block
        for _ in range(num_blocks):
            if block is None or block.block_hash is not None:
                return True
            block = block.next_free_block
        return False
