"""Whole prompts and compacted prefixes in CPU memory, by vLLM's `SimpleCPUOffloadConnector`.

The connector has a second block pool in CPU memory and copies blocks between the two pools. In its lazy mode it stores
blocks that the GPU's pool is about to reuse, under the same hashes, and finds them by the hashes of a prompt's tokens.
Compacted prefixes have names instead of these hashes (`shared_prefixes`). They are stored as soon as they are
published, found by name, and always loaded whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request, RequestStatus
from vllm.v1.simple_kv_offload.manager import LoadRequestState, TransferMeta

from vllm_l2kv.scheduler.external_hits import ExternalHits
from vllm_l2kv.scheduler.shared_prefixes import Prefix, Prefixes, SharedPrefixes


@dataclass
class LookupRequest:
    """The part of a request that the connector may look up, with all attributes that the connector reads."""

    request_id: str
    num_tokens: int
    block_hashes: Any
    skip_reading_prefix_cache: bool


class CPUMemory(ExternalHits):
    """Stores, finds and loads whole prompts and compacted prefixes.

    Args:
        connector: vLLM's `SimpleCPUOffloadConnector`, in lazy mode.
        bound: As for `ExternalHits`.
        shared: Names compacted prefixes.
        pool: The GPU's block pool.

    Raises:
        ValueError: CPU memory holds fewer blocks than the GPU's cache. The connector would store the same blocks again
            and again.
    """

    def __init__(self, connector: Any, bound: Callable[[Request], int], shared: SharedPrefixes, pool: Any) -> None:
        super().__init__(connector, bound)
        self._manager = connector.scheduler_manager
        self._pool = self._manager.cpu_block_pool
        self._gpu_pool = pool
        self._shared = shared
        if self._pool.num_gpu_blocks < pool.num_gpu_blocks:
            raise ValueError(
                f"cpu_bytes_to_use must hold at least the {pool.num_gpu_blocks} blocks of the GPU's KV cache, got "
                f"{self._pool.num_gpu_blocks}; raise it (--kv-transfer-config), or make the cache smaller "
                "(--kv-cache-memory-bytes)."
            )
        self._chosen: dict[str, Prefix] = {}  # request id to the prefix that it loads and begins on
        self._loading: dict[BlockHash, Request] = {}

    def find(self, prefixes: Prefixes, begin: int) -> Prefix | None:
        """The longest compacted prefix of more than `begin` tokens that is in CPU memory."""
        for prefix in reversed(prefixes.findable):
            if prefix.compaction.position <= begin:
                return None
            if self._shared.is_complete(prefix, self._pool):
                return prefix
        return None

    def choose(self, req_id: str, prefix: Prefix | None) -> None:
        """Notes the compacted prefix that a request loads if it is admitted now; `None` for none."""
        self._chosen.pop(req_id, None)
        if prefix is not None:
            self._chosen[req_id] = prefix

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Same contract as upstream. One request loads a prefix; others wait until it is in the GPU's pool."""
        prefix = self._chosen.get(request.request_id)
        num_tokens = min(request.num_tokens, 1 + (0 if prefix else self._bound(request)))
        skips = bool(request.skip_reading_prefix_cache)
        # Called even if the connector can find nothing, so that it forgets earlier hits of this request.
        lookup: Any = LookupRequest(request.request_id, num_tokens, request.block_hashes, skips)
        hit: tuple[int | None, bool] = self.connector.get_num_new_matched_tokens(lookup, num_computed_tokens)
        if prefix is None:
            return hit
        if self._is_loaded_by_another(request, prefix):
            return None, False
        return prefix.compaction.position, True

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Same contract as upstream; orders the load of a compacted prefix into the request's blocks."""
        prefix = self._chosen.get(request.request_id)
        if prefix is None or num_external_tokens == 0:
            self.connector.update_state_after_alloc(request, blocks, num_external_tokens)
            return
        found = self._shared.blocks_of(prefix, self._pool)
        assert found is not None, "a block of the prefix has left the CPU pool since it was found"
        pairs = [pair for group in zip(found, blocks.blocks, strict=True) for pair in zip(*group, strict=True)]
        # The connector releases both when the copy is complete.
        self._pool.touch([here for here, _ in pairs])
        self._gpu_pool.touch([there for _, there in pairs])
        transfer = TransferMeta([there.block_id for _, there in pairs], [here.block_id for here, _ in pairs])
        self._manager._reqs_to_load[request.request_id] = LoadRequestState(request=request, transfer_meta=transfer)
        self._loading[prefix.name] = request

    def take_loaded(self, req_id: str) -> Prefix | None:
        """The compacted prefix that a request has loaded, returned once; `None` if it has loaded none."""
        prefix = self._chosen.pop(req_id, None)
        if prefix is not None:
            self._loading.pop(prefix.name, None)
        return prefix

    def forget(self, req_id: str) -> None:
        """Forgets a request that has ended or is looked up again."""
        prefix = self._chosen.pop(req_id, None)
        if prefix is not None and prefix.name in self._loading and self._loading[prefix.name].request_id == req_id:
            del self._loading[prefix.name]

    def store(self, prefix: Prefix) -> None:
        """Copies a prefix that was just published to CPU memory with the next step, replacing an older copy.

        All blocks at once: a copy is useful only if it is complete, and it is small.
        """
        self._shared.forget_copy(prefix, self._pool)
        cached = self._pool.cached_block_hash_to_block
        missing = [
            block
            for keys, blocks in zip(self._shared.keys_of(prefix), self._shared.blocks_of(prefix) or (), strict=False)
            for key, block in zip(keys, blocks, strict=True)
            if cached.get_one_block(key) is None
        ]
        if len(missing) > self._pool.get_num_free_blocks():
            return
        taken = self._pool.get_new_blocks(len(missing))
        self._gpu_pool.touch(missing)
        transfer = TransferMeta([block.block_id for block in missing], [block.block_id for block in taken])
        self._manager._pending_finished_stores.append(transfer)

    def blocks_in_use(self) -> set[int]:
        """Ids of GPU blocks that are being stored; they must keep their hashes until the connector has read them."""
        transfers = (*self._manager._store_event_to_blocks.values(), *self._manager._pending_finished_stores)
        return {block_id for transfer in transfers for block_id in transfer.gpu_block_ids}

    def _is_loaded_by_another(self, request: Request, prefix: Prefix) -> bool:
        other = self._loading.get(prefix.name)
        return other is not None and other is not request and other.status == RequestStatus.WAITING_FOR_REMOTE_KVS
