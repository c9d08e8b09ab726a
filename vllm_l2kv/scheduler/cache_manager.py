"""Block accounting of compacted requests.

vLLM's managers size a request by its positions. Once a request is compacted its slots are `position - num_evicted`,
and a manager of compressed layers answers in slots.
"""

from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager

from vllm_l2kv import plan
from vllm_l2kv.messages import GroupMove

_EVERYTHING_CACHED = 2**62
"""A number of cached blocks that no request reaches."""


def stop_prefix_caching(manager: SingleTypeKVCacheManager, request_id: str) -> None:
    """Keeps a request's later blocks out of the prefix cache, in any group.

    Keys and values computed from here on depend on a compressed context; a request that shares the same tokens but
    not the compression must not find them. A manager publishes blocks from its count of cached ones upward, so a
    count beyond every block ends that. vLLM drops the count when the request's blocks are freed.
    """
    manager.num_cached_block[request_id] = _EVERYTHING_CACHED


class FullLayerManager(FullAttentionManager):
    """Blocks of full layers: vLLM's own accounting under a class of ours, because their spec has one."""


class CompressedLayerManager(FullAttentionManager):
    """Blocks of compressed layers.

    Attributes:
        num_evicted: Compacted requests to the slots by which their positions moved forward.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_evicted: dict[str, int] = {}

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """As vLLM's, in slots."""
        return super().get_num_blocks_to_allocate(request_id, self._num_slots(request_id, num_tokens), *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        """As vLLM's, in slots."""
        return super().allocate_new_blocks(request_id, self._num_slots(request_id, num_tokens), *args, **kwargs)

    def cache_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """As vLLM's until the request is compacted, then nothing: its rows no longer lie where their hashes say."""
        if request.request_id not in self.num_evicted:
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's; finish, abort and preemption all come through here and forget the compaction."""
        self.num_evicted.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def num_destination_blocks(self, num_slots: int) -> int:
        """Blocks that a compaction to `num_slots` rows needs."""
        return plan.num_blocks_for(num_slots, self.block_size)

    def fits_in_place(self, request_id: str, num_slots: int) -> bool:
        """Whether the request's own first blocks could take `num_slots` rows."""
        private = [block.ref_cnt == 1 and not block.is_null for block in self.req_to_blocks[request_id]]
        return plan.fits_in_place(private, self.num_destination_blocks(num_slots))

    def compact(
        self, request_id: str, num_evicted: int, num_slots: int, in_place: bool
    ) -> tuple[GroupMove, list[KVCacheBlock]]:
        """Points the request at the blocks of its kept rows.

        Args:
            request_id: The request, not compacted yet.
            num_evicted: Slots that vanish.
            num_slots: Rows that stay.
            in_place: Use the request's own first blocks instead of fresh ones from the pool.

        Returns:
            The move, and the blocks that the caller must free once every order of this step has its blocks: freed
            earlier, they could become the destination of a neighbour while they still are a source here.
        """
        assert request_id not in self.num_evicted
        source = self.req_to_blocks[request_id]
        num_blocks = self.num_destination_blocks(num_slots)
        if in_place:
            destination, released = source[:num_blocks], source[num_blocks:]
            # Their contents are about to change under the hash that others would find them by.
            self.block_pool.evict_blocks({block.block_id for block in destination})
        else:
            destination, released = self.block_pool.get_new_blocks(num_blocks), source
        self.req_to_blocks[request_id] = destination
        self.num_evicted[request_id] = num_evicted
        move = GroupMove(
            self.kv_cache_group_id,
            tuple(block.block_id for block in source),
            tuple(block.block_id for block in destination),
        )
        return move, released

    def _num_slots(self, request_id: str, num_tokens: int) -> int:
        return num_tokens - self.num_evicted.get(request_id, 0)
