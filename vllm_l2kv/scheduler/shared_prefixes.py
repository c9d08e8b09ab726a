"""Compacted prefixes of prompts, which later requests find and begin with.

The rows that a compaction before the end of a prompt leaves depend on the tokens up to it, on how rows are chosen and
on the compactions so far, and on nothing else. Their name is a hash of all that. Their blocks are findable under it, as
any cached block is under the hash of its tokens: vLLM's pool holds, shares and evicts them.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    generate_block_hash_extra_keys,
    get_block_hash,
    hash_block_tokens,
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
)
from vllm.v1.request import Request

from vllm_l2kv import seams
from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.policy import Compaction, CompactionPoints
from vllm_l2kv.scheduler.cache_manager import CompressedLayerManager, RecurrentLayerManager, TailManager

GroupBlocks = tuple[list[KVCacheBlock], ...]


@dataclass(eq=False)
class Prefix:
    """One compacted prefix of a prompt.

    Attributes:
        compaction: The compaction that leaves it.
        name: Hash of all that its rows depend on.
    """

    compaction: Compaction
    name: BlockHash
    keys: tuple[list[BlockHashWithGroupId], ...] | None = None  # by group; made when a copy seems to be there
    key_set: frozenset[BlockHashWithGroupId] = frozenset()


@dataclass
class Prefixes:
    """The compacted prefixes of one request's prompt.

    Attributes:
        findable: All of them, shortest first.
        to_publish: Those that the request makes findable if it computes them.
    """

    findable: Sequence[Prefix] = ()
    to_publish: Sequence[Prefix] = ()
    # The last answer, and how many publications there had been.
    found: tuple[Prefix, GroupBlocks] | None = field(default=None, repr=False)
    found_at: int = field(default=-1, repr=False)


class SharedPrefixes:
    """Names, publishes and finds compacted prefixes.

    Args:
        kv_cache_manager: vLLM's.
        hash_algorithm: vLLM's name of the function that hashes its blocks.
    """

    def __init__(self, kv_cache_manager: Any, hash_algorithm: str) -> None:
        self._managers = kv_cache_manager.coordinator.single_type_managers
        self._pool = kv_cache_manager.block_pool
        self._hash = get_hash_fn_by_name(hash_algorithm)
        self._is_possible = kv_cache_manager.enable_caching
        self._recurrent = [manager for manager in self._managers if isinstance(manager, RecurrentLayerManager)]
        self._first_group = next(
            group for group, manager in enumerate(self._managers) if isinstance(manager, CompressedLayerManager)
        )
        self._num_published = 0
        self._computed_by: dict[BlockHash, str] = {}

    def of(self, request: Request, points: CompactionPoints) -> Prefixes:
        """The prefixes of a request's prompt that it may find or publish. Call it once a request, since it hashes."""
        if not self._is_possible:
            return Prefixes()
        params = points.params
        how = (params.protect_first, params.protect_last, params.scorer, params.granularity)
        history = self._hash(("l2kv", how))
        findable = []
        for compaction in points.in_prompt():
            history = self._hash((history, compaction.position, compaction.num_keep))
            findable.append(Prefix(compaction, self._name(request, compaction.position, history)))
        published = points.to_publish()
        return Prefixes(findable, [prefix for prefix in findable if prefix.compaction in published])

    def find(self, prefixes: Prefixes) -> tuple[Prefix, GroupBlocks] | None:
        """The longest prefix of which all blocks are there, with these blocks.

        A waiting request asks at each step. As long as nothing new is published, only its last answer is checked.
        """
        last = prefixes.found
        if prefixes.found_at == self._num_published and (last is None or self.is_complete(last[0], self._pool)):
            return last
        prefixes.found_at, prefixes.found = self._num_published, None
        for prefix in reversed(prefixes.findable):
            blocks = self.blocks_of(prefix)
            if blocks is not None:
                prefixes.found = prefix, blocks
                break
        return prefixes.found

    def publish(self, request: Request, prefix: Prefix, in_use: Collection[int] = ()) -> bool:
        """Makes a prefix findable in the request's own blocks, once it is certain that the worker will compact it.

        There is one copy of a name. A complete one stays; what is left of an incomplete one is forgotten first. Rows of
        two copies may differ where rounding decided, so blocks of both together could double a row or lose one.

        Args:
            request: Its blocks hold the rows.
            prefix: The prefix.
            in_use: Ids of blocks that must not be forgotten now; if something of an older copy is there, that stays.

        Returns:
            Whether it is new. Nothing is published if there was no block for the state of a recurrent layer.
        """
        if self.is_complete(prefix, self._pool) or self._has_left(prefix, in_use):
            return False
        req_id = request.request_id
        if any(req_id not in manager.kept for manager in self._recurrent):
            return False
        self.forget_copy(prefix, self._pool)
        for group, keys in enumerate(self.keys_of(prefix)):
            manager = self._managers[group]
            table, added = manager.req_to_blocks[req_id], []
            for key, i in zip(keys, self._indices(group, prefix), strict=True):
                # A key has one block. What is left of full layers, windows and states is as good: they choose no rows.
                if self._find(key) is None:
                    block = manager.kept[req_id] if manager in self._recurrent else table[i]
                    self._pool._insert_block_hash(key, block, num_tokens=prefix.compaction.position)
                    added.append(key)
            if isinstance(manager, TailManager):
                manager.hold(req_id, [block for key in keys if (block := self._find(key)) is not None])
            self._announce(request, prefix, group, added)
        self._num_published += 1
        return True

    def forget_copy(self, prefix: Prefix, pool: BlockPool) -> None:
        """Makes what is left of a copy's compressed layers unfindable in a pool. Others choose no rows."""
        for key in self._copied_keys(prefix):
            while (left := self._find(key, pool)) is not None:
                pool.evict_blocks({left.block_id})

    def _has_left(self, prefix: Prefix, block_ids: Collection[int]) -> bool:
        """Whether something of a copy is in one of these blocks."""
        left = (self._find(key) for key in self._copied_keys(prefix)) if block_ids else ()
        return any(block is not None and block.block_id in block_ids for block in left)

    def _copied_keys(self, prefix: Prefix) -> Iterable[BlockHashWithGroupId]:
        """The keys of compressed layers."""
        for group, keys in enumerate(self.keys_of(prefix)):
            if isinstance(self._managers[group], CompressedLayerManager):
                yield from keys

    def announce(self, request: Request, prefix: Prefix) -> None:
        """Publishes the KV events of a prefix that is there. vLLM publishes those of its removal."""
        for group, keys in enumerate(self.keys_of(prefix)):
            self._announce(request, prefix, group, keys)

    def _announce(self, request: Request, prefix: Prefix, group: int, keys: Sequence[BlockHashWithGroupId]) -> None:
        """Publishes the KV event of blocks of a prefix.

        They hold no run of tokens. Routers match prompts by tokens and extra keys, so each block counts as one token
        with an extra key that no prompt has: they see it come and go, and prefer this engine for no prompt.
        """
        if not self._pool.enable_kv_cache_events or not keys:
            return
        event = seams.stored_event(
            self._pool,
            request,
            block_hashes=[maybe_convert_block_hash(get_block_hash(key)) for key in keys],
            parent_block_hash=None,
            start_token_idx=0,
            end_token_idx=len(keys),
            block_size=1,
            kv_cache_group_id=group,
            extra_keys_list=[(("l2kv", prefix.name.hex()),)] * len(keys),
        )
        self._pool.kv_event_queue.append(event)

    def computes(self, req_id: str, prefix: Prefix) -> None:
        """Notes which request is about to compute a prefix that it will publish."""
        self._computed_by[prefix.name] = req_id

    def computed_by(self, prefix: Prefix) -> str | None:
        """The request that was last noted; it may have ended or passed it since."""
        return self._computed_by.get(prefix.name)

    def forget(self, req_id: str, prefixes: Iterable[Prefix]) -> None:
        """Forgets a request that has ended."""
        for prefix in prefixes:
            if self._computed_by.get(prefix.name) == req_id:
                del self._computed_by[prefix.name]

    def num_partial_blocks(self, prefix: Prefix) -> int:
        """Blocks at the end of a prefix that its rows do not fill: a request that begins with it gets copies."""
        return sum(
            self._num_rows(group, prefix) % manager.block_size != 0 for group, manager in enumerate(self._managers)
        )

    def _name(self, request: Request, position: int, history: bytes) -> BlockHash:
        """Hash of the tokens up to `position`, of what vLLM's hashes know beside them, and of what we know.

        vLLM's chain of block hashes ends before the last tokens, which may fill no block, and before a block whose hash
        covers tokens after `position`. It knows adapters, salts and images.
        """
        unit = self._pool.hash_block_size
        begin = max(position - seams.num_hash_lookahead(self._pool), 0) // unit * unit
        before = request.block_hashes[begin // unit - 1] if begin else None
        extra_keys, _ = generate_block_hash_extra_keys(request, begin, position, 0)
        return hash_block_tokens(
            self._hash, before, request.all_token_ids[begin:position], (extra_keys, "l2kv", history)
        )

    def _num_rows(self, group: int, prefix: Prefix) -> int:
        is_compressed = isinstance(self._managers[group], CompressedLayerManager)
        return prefix.compaction.num_keep if is_compressed else prefix.compaction.position

    def _num_passed(self, group: int, prefix: Prefix) -> int:
        """Blocks before its end that a window or a state has passed; 0 in other layers."""
        manager = self._managers[group]
        num_blocks: int = manager.get_num_skipped_tokens(prefix.compaction.position) // manager.block_size
        return num_blocks

    def _indices(self, group: int, prefix: Prefix) -> range:
        """Where its blocks are in a request's table."""
        end = num_blocks_for(self._num_rows(group, prefix), self._managers[group].block_size)
        return range(self._num_passed(group, prefix), end)

    def keys_of(self, prefix: Prefix) -> tuple[list[BlockHashWithGroupId], ...]:
        """Under what its blocks are findable, by group."""
        if prefix.keys is None:
            prefix.keys = tuple(
                [self._key(prefix, group, i) for i in self._indices(group, prefix)]
                for group in range(len(self._managers))
            )
            prefix.key_set = frozenset().union(*prefix.keys)
        return prefix.keys

    def _key(self, prefix: Prefix, group: int, index: int) -> BlockHashWithGroupId:
        """The name, counted on: KV events may have room for the last 64 bits only, in which all keys differ."""
        length = len(prefix.name)
        number = (int.from_bytes(prefix.name, "big") + index) % (1 << 8 * length)
        return make_block_hash_with_group_id(BlockHash(number.to_bytes(length, "big")), group)

    def _find(self, key: BlockHashWithGroupId, pool: BlockPool | None = None) -> KVCacheBlock | None:
        block: KVCacheBlock | None = (pool or self._pool).cached_block_hash_to_block.get_one_block(key)
        return block

    def is_complete(self, prefix: Prefix, pool: BlockPool) -> bool:
        """Whether all blocks of a prefix are findable in a pool."""
        if prefix.keys is None and self._find(self._key(prefix, self._first_group, 0), pool) is None:
            return False
        self.keys_of(prefix)
        # One operation on sets: a waiting request comes here at each step, and a document has thousands of blocks.
        # As a key has one block, and gets another only when something is published, the blocks are the same as well.
        return prefix.key_set <= pool.cached_block_hash_to_block._cache.keys()

    def blocks_of(self, prefix: Prefix, pool: BlockPool | None = None) -> GroupBlocks | None:
        """The blocks of a prefix in a pool (by default vLLM's), if all are there.

        As in vLLM's hits, blocks that a window or a state has passed are null.
        """
        pool = pool or self._pool
        if not self.is_complete(prefix, pool):
            return None
        groups = []
        for group, keys in enumerate(self.keys_of(prefix)):
            passed = [pool.null_block] * self._num_passed(group, prefix)
            groups.append(passed + [block for key in keys if (block := self._find(key, pool)) is not None])
        return tuple(groups)
