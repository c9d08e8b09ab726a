"""Block accounting of compacted requests.

vLLM's managers size a request by its positions. Once a request is compacted its slots are `position - num_evicted`,
and a manager of compressed layers counts slots. So it does for a request that begins on rows which another one has
compacted, from its admission on.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, KVCacheCoordinator
from vllm.v1.core.kv_cache_utils import (
    KVCacheBlock,
    generate_block_hash_extra_keys,
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
)
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    MambaManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.request import Request

from vllm_l2kv import block_math, seams
from vllm_l2kv.messages.orders import GroupMove

UNREACHABLE = 2**62
"""More blocks, or tokens, than any request has."""


def stop_prefix_caching(manager: SingleTypeKVCacheManager, request_id: str) -> None:
    """Keeps a request's later blocks out of the prefix cache, in any group.

    Keys and values computed from here on depend on a compressed context; a request that shares the same tokens but
    not the compression must not find them. A manager publishes blocks from its count of cached ones upward, so a
    count beyond every block ends that. vLLM drops the count when the request's blocks are freed.
    """
    manager.num_cached_block[request_id] = UNREACHABLE
    if isinstance(manager, LayerManager):
        manager.next_cacheable[request_id] = UNREACHABLE


def find_prefixes_inside_blocks(coordinator: KVCacheCoordinator) -> None:
    """Lets prefix-cache hits end at any hash boundary, not only where the blocks of all groups end.

    The blocks of the class with fewer layers are large, and prompts that differ from the middle of one on would share
    nothing of it. vLLM can hit inside a block, of which the request gets a copy, but switches that on for Mamba alone.
    It stays off where a manager has larger blocks and cannot look inside them.
    """
    if not isinstance(coordinator, HybridKVCacheCoordinator):
        return
    unit = coordinator.hash_block_size
    managers = coordinator.single_type_managers
    if all(manager.supports_fine_grained_hash_lookup or manager.block_size == unit for manager in managers):
        coordinator.enable_partial_hash_hits = True
        for manager in managers:
            manager.cache_hit_alignment_tokens = unit


def announce_hit(manager: SingleTypeKVCacheManager, request: Request, num_tokens: int) -> None:
    """Publishes KV events for a request's hit in one group's prefix cache, up to `num_tokens`.

    vLLM's own report names whole blocks. Where a hit ends inside a block, it would name a block that is not cached, or
    one beyond the request's hashes.
    """
    size, pool = manager.block_size, manager.block_pool
    num_blocks = num_tokens // size
    pool.emit_cached_block_events(request, num_blocks, size, manager.kv_cache_group_id)
    if isinstance(manager, LayerManager):
        for begin in range(num_blocks * size, num_tokens, pool.hash_block_size):
            manager.announce(request, begin + pool.hash_block_size)


class LayerManager(FullAttentionManager):
    """Blocks that prefix-cache hits can use up to every hash boundary inside them.

    vLLM calls each manager several times per request and step, mostly for nothing: a block fills up once in
    `block_size` steps. Two groups double that work, so each method first compares one number.

    Attributes:
        num_tokens_allocated: Requests to the number of tokens for which they have slots, evicted tokens included.
        next_cacheable: Requests to the number of tokens at which there is more to put into the prefix cache.
        compacted_hits: Waiting requests that are to begin on compacted rows, to the tokens evicted from these.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_tokens_allocated: dict[str, int] = {}
        self.next_cacheable: dict[str, int] = {}
        self.compacted_hits: dict[str, int] = {}

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """Same contract as upstream, but counts slots; asked for a whole request, the most that it holds at a time."""
        if num_tokens <= self.num_tokens_allocated.get(request_id, 0):
            return 0
        num_evicted = self._num_evicted(request_id)
        num_slots = num_tokens - num_evicted
        if apply_admission_cap:
            num_slots = min(num_slots, self._max_slots(request_id))
        return super().get_num_blocks_to_allocate(
            request_id,
            num_slots,
            new_computed_blocks,
            total_computed_tokens - num_evicted,
            num_local_computed_tokens - num_evicted,
            *args,
            apply_admission_cap=apply_admission_cap,
            **kwargs,
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Same contract as upstream, but counts slots. What follows compacted rows is not for the prefix cache.

        Nothing is local where a KV connector is to bring the compacted rows.
        """
        num_slots = max(0, num_local_computed_tokens - self._num_evicted(request_id))
        super().add_local_computed_blocks(request_id, new_computed_blocks, num_slots, *args, **kwargs)
        num_evicted = self.compacted_hits.pop(request_id, None)
        if num_evicted is not None:
            self._begin_compacted(request_id, num_evicted)
            # Not before: vLLM would take the request for one that runs already, and drop what was found.
            stop_prefix_caching(self, request_id)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Same contract as upstream, but counts slots: compacted rows that a KV connector brings are all of them."""
        num_slots = num_external_computed_tokens - self._num_evicted(request_id)
        super().allocate_external_computed_blocks(request_id, num_local_computed_tokens, num_slots, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        """Same contract as upstream, but counts slots."""
        if num_tokens <= self.num_tokens_allocated.get(request_id, 0):
            return []
        num_slots = num_tokens - self._num_evicted(request_id)
        blocks = super().allocate_new_blocks(request_id, num_slots, *args, **kwargs)
        self._note_allocated(request_id)
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Same contract as upstream, for every hash boundary; does nothing after `stop_prefix_caching`."""
        next_cacheable = self.next_cacheable.get(request.request_id, 0)
        if num_tokens < next_cacheable:
            return
        unit = self.block_pool.hash_block_size
        was_cached = self.num_cached_block.get(request.request_id, 0) * self.block_size
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        cached_until = is_cached = self.num_cached_block.get(request.request_id, 0) * self.block_size
        if self.block_size > unit:
            begin = next_cacheable - unit if next_cacheable else was_cached
            # A block that fills up loses the entries of its boundaries to its own hash, so they are added again.
            begin = min(begin, was_cached) if is_cached > was_cached else begin
            cached_until = self._cache_boundaries(request, begin, num_tokens)
        self.next_cacheable[request.request_id] = cached_until + unit

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Same contract as upstream; called when a request finishes, is aborted or is preempted."""
        self.num_tokens_allocated.pop(request_id, None)
        self.next_cacheable.pop(request_id, None)
        self.compacted_hits.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def _num_evicted(self, request_id: str) -> int:
        """Evicted tokens of a request: its slots are `position - num_evicted`."""
        return 0

    def _max_slots(self, request_id: str) -> int:
        """A bound on the slots that a request holds at a time."""
        return UNREACHABLE

    def _begin_compacted(self, request_id: str, num_evicted: int) -> None:
        """Called when a request is admitted on compacted rows."""

    def _note_allocated(self, request_id: str) -> None:
        num_slots = len(self.req_to_blocks[request_id]) * self.block_size
        self.num_tokens_allocated[request_id] = num_slots + self._num_evicted(request_id)

    def _cache_partial_tail_block(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: upstream caches the end of a prompt in the step that computes it, before a copy is safe."""

    def _cache_boundaries(self, request: Request, begin: int, end: int) -> int:
        """Caches the boundaries after `begin`, up to `end`: usually none or one per decode step.

        Only those of earlier steps: a request that hits inside a block gets a copy of it before the step writes its
        rows.

        Returns:
            Number of tokens up to which every boundary is cached.
        """
        pool = self.block_pool
        unit = pool.hash_block_size
        end = min(end // unit, request.num_computed_tokens // unit, len(request.block_hashes)) * unit
        blocks = self.req_to_blocks[request.request_id]
        for boundary in range(begin + unit, end + unit, unit):
            if boundary % self.block_size:
                block = blocks[boundary // self.block_size]
                key = make_block_hash_with_group_id(request.block_hashes[boundary // unit - 1], self.kv_cache_group_id)
                if not pool.cached_block_hash_to_block.contain(key, block.block_id):
                    pool._insert_block_hash(key, block, num_tokens=boundary)
                    self.announce(request, boundary)
        return max(begin, end)

    def announce(self, request: Request, boundary: int) -> None:
        """Publishes the KV event of one boundary inside a block, as `BlockPool.cache_partial_block` does."""
        pool = self.block_pool
        if not pool.enable_kv_cache_events:
            return
        unit = pool.hash_block_size
        index = boundary // unit - 1
        extra_keys, _ = generate_block_hash_extra_keys(request, boundary - unit, boundary, 0)
        event = seams.stored_event(
            pool,
            request,
            block_hashes=[maybe_convert_block_hash(request.block_hashes[index])],
            parent_block_hash=maybe_convert_block_hash(request.block_hashes[index - 1]) if index else None,
            start_token_idx=boundary - unit,
            end_token_idx=boundary,
            block_size=unit,
            kv_cache_group_id=self.kv_cache_group_id,
            extra_keys_list=[extra_keys],
        )
        pool.kv_event_queue.append(event)


class FullLayerManager(LayerManager):
    """Blocks of full layers."""


class CompressedLayerManager(LayerManager):
    """Blocks of compressed layers.

    Attributes:
        num_evicted: Compacted requests to their evicted tokens; their slots are `position - num_evicted`.
        max_rows: Requests that are to be compacted, to the rows that they hold at most at a time. Where they begin on
            compacted rows, from there on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_evicted: dict[str, int] = {}
        self.max_rows: dict[str, int] = {}

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Same contract as upstream; a request that finishes, is aborted or is preempted is no longer compacted."""
        self.num_evicted.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def num_destination_blocks(self, num_slots: int) -> int:
        """Blocks that a compaction to `num_slots` rows needs."""
        return block_math.num_blocks_for(num_slots, self.block_size)

    def fits_in_place(self, request_id: str, num_slots: int) -> bool:
        """Whether the request's own first blocks could take `num_slots` rows."""
        private = [block.ref_cnt == 1 and not block.is_null for block in self.req_to_blocks[request_id]]
        return block_math.fits_in_place(private, self.num_destination_blocks(num_slots))

    def compact(
        self, request_id: str, num_evicted: int, num_slots: int, in_place: bool
    ) -> tuple[GroupMove, list[KVCacheBlock]]:
        """Gives the request the blocks of its kept rows.

        Args:
            request_id: The request.
            num_evicted: Tokens evicted, those of earlier compactions included.
            num_slots: Rows kept.
            in_place: Use the request's own first blocks instead of fresh ones from the pool.

        Returns:
            The move, and the blocks that the caller must free once every order of this step has its blocks: freed
            earlier, they could become the destination of another order while they are still a source of this one.
        """
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
        self._note_allocated(request_id)
        move = GroupMove(
            self.kv_cache_group_id,
            tuple(block.block_id for block in source),
            tuple(block.block_id for block in destination),
        )
        return move, released

    def _num_evicted(self, request_id: str) -> int:
        return self.num_evicted.get(request_id) or self.compacted_hits.get(request_id, 0)

    def _max_slots(self, request_id: str) -> int:
        return self.max_rows.get(request_id, UNREACHABLE)

    def _begin_compacted(self, request_id: str, num_evicted: int) -> None:
        self.num_evicted[request_id] = num_evicted


class TailManager(SingleTypeKVCacheManager):
    """Blocks of layers that hold the end of a context only: slots are positions, and passed blocks are null.

    vLLM frees a block as soon as a request has passed it. Those at the end of a compacted prefix serve others who
    begin with it, so the request that publishes the prefix holds them until it ends, as it holds its other blocks.

    Attributes:
        compacted_hits: Waiting requests that are to begin on compacted rows, to the tokens evicted from these.
        held: Requests to the blocks that they hold for others, beside those in their tables.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compacted_hits: dict[str, int] = {}
        self.held: dict[str, list[KVCacheBlock]] = {}

    def add_local_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        """Same contract as upstream. What follows compacted rows is not for the prefix cache."""
        super().add_local_computed_blocks(request_id, *args, **kwargs)
        if self.compacted_hits.pop(request_id, None) is not None:
            # Not later: in this very step vLLM caches the blocks that the request fills.
            stop_prefix_caching(self, request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Same contract as upstream; the blocks that the request holds for others come first, so they stay longest."""
        self.compacted_hits.pop(request_id, None)
        return [*self.held.pop(request_id, ()), *super().pop_blocks_for_free(request_id)]

    def hold(self, request_id: str, blocks: list[KVCacheBlock]) -> None:
        """Keeps blocks from being reused until the request ends or `let_go_of_held` is called."""
        self.block_pool.touch(blocks)
        self.held.setdefault(request_id, []).extend(blocks)


class SlidingLayerManager(TailManager, SlidingWindowManager):
    """Blocks of layers that attend to a window of the last tokens."""


class ChunkedLayerManager(TailManager, ChunkedLocalAttentionManager):
    """Blocks of layers that attend to the chunk that a token lies in."""


def let_go_of_held(managers: Sequence[TailManager]) -> bool:
    """Frees the blocks that requests hold for others.

    Requests are sized without them. So they must go before a request is preempted or waits for want of blocks, or one
    that runs alone would be preempted again and again.

    Returns:
        Whether there were any.
    """
    held = [block for manager in managers for blocks in manager.held.values() for block in blocks]
    for manager in managers:
        manager.held.clear()
    if held:
        managers[0].block_pool.free_blocks(held)
    return bool(held)


class RecurrentLayerManager(TailManager, MambaManager):
    """Blocks of recurrent layers, one state in each: that of all tokens of a request, however few rows it holds.

    Attributes:
        kept: Requests to copies of their states at this step's compactions, until `drop_states`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: dict[str, KVCacheBlock] = {}

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Same contract as upstream; does nothing after `stop_prefix_caching`.

        Upstream caches a state at the end of a prompt whatever its count of cached blocks says.
        """
        if self.num_cached_block.get(request.request_id, 0) < UNREACHABLE:
            super().cache_blocks(request, *args, **kwargs)

    def keep_state(self, request_id: str, num_tokens: int) -> None:
        """Has the worker copy a request's state, which the request's next step overwrites, into a fresh block.

        The pool must have one. vLLM's copy-on-write makes the copy before the model runs in this step.

        Args:
            request_id: A request whose last scheduled step computes the state.
            num_tokens: Tokens that the state is of.
        """
        state = self.req_to_blocks[request_id][block_math.num_blocks_for(num_tokens, self.block_size) - 1]
        (copy,) = self.block_pool.get_new_blocks(1)
        self.kept[request_id] = copy
        # vLLM frees both once more when the copy has been made.
        self._pending_cow_copies.append((state, copy))
        self.block_pool.touch([state, copy])

    def drop_states(self) -> None:
        """Frees the copies of this step's states that no request holds, see `hold`."""
        self.block_pool.free_blocks(self.kept.values())
        self.kept = {}
