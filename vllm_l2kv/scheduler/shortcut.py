"""Slots of decoding requests without a walk through vLLM's managers."""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from vllm_l2kv.scheduler.cache_manager import LayerManager


class Shortcut:
    """Stands before vLLM's `KVCacheManager` and answers at once where nothing is to do.

    A request that decodes asks for slots at every step, and mostly its last block has room and nothing new can be
    found in it. vLLM asks each group's manager four times to learn that, and we have a group more than vLLM.
    Everything else goes to the manager itself.
    """

    def __init__(self, manager: KVCacheManager, layers: list[LayerManager]) -> None:
        self._manager = manager
        self._layers = layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, num_lookahead_tokens: int = 0, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """As vLLM's."""
        if args or kwargs or not self._has_nothing_to_do(request, num_new_tokens, num_lookahead_tokens):
            kwargs["num_lookahead_tokens"] = num_lookahead_tokens
            return self._manager.allocate_slots(request, num_new_tokens, *args, **kwargs)
        return self._manager.empty_kv_cache_blocks

    def _has_nothing_to_do(self, request: Request, num_new_tokens: int, num_lookahead_tokens: int) -> bool:
        req_id = request.request_id
        num_tokens = request.num_computed_tokens + num_new_tokens
        num_known = min(num_tokens, request.num_tokens)
        num_tokens += num_lookahead_tokens
        return all(
            num_tokens <= layer.room.get(req_id, 0) and num_known < layer.next_findable.get(req_id, 0)
            for layer in self._layers
        )


def take_shortcuts(manager: KVCacheManager) -> KVCacheManager | Shortcut:
    """The manager behind a `Shortcut`, or as it is if it also manages layers that are not ours (sliding windows)."""
    layers = manager.coordinator.single_type_managers
    ours = [layer for layer in layers if isinstance(layer, LayerManager)]
    return Shortcut(manager, ours) if len(ours) == len(layers) else manager
