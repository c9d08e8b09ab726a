"""Fast path: decoding requests that need no new block skip vLLM's per-group bookkeeping."""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from vllm_l2kv.scheduler.cache_manager import LayerManager


class DecodeFastPath:
    """Wraps vLLM's `KVCacheManager` and returns at once if there is nothing to do.

    A decoding request needs a slot at every step. Usually its last block has a free slot, and no new block boundary
    must be cached. vLLM calls each group's manager five times per step to find that out, and compression adds a group.
    All other calls go to the wrapped manager.

    Attributes:
        manager: The wrapped manager.
    """

    def __init__(self, manager: KVCacheManager, layers: list[LayerManager]) -> None:
        self.manager = manager
        self._layers = layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, num_lookahead_tokens: int = 0, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """Same contract as upstream."""
        num_tokens = request.num_computed_tokens + num_new_tokens
        if (
            args
            or kwargs
            or not self._is_allocated(request, num_tokens + num_lookahead_tokens)
            or self._has_more_to_cache(request, min(num_tokens, request.num_tokens))
        ):
            kwargs["num_lookahead_tokens"] = num_lookahead_tokens
            return self.manager.allocate_slots(request, num_new_tokens, *args, **kwargs)
        return self.manager.empty_kv_cache_blocks

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Same contract as upstream."""
        if self._has_more_to_cache(request, num_computed_tokens):
            self.manager.cache_blocks(request, num_computed_tokens)

    def _is_allocated(self, request: Request, num_tokens: int) -> bool:
        # A plain loop, here and below: it runs for every request at every step.
        for layer in self._layers:  # noqa: SIM110
            if num_tokens > layer.num_tokens_allocated.get(request.request_id, 0):
                return False
        return True

    def _has_more_to_cache(self, request: Request, num_tokens: int) -> bool:
        for layer in self._layers:  # noqa: SIM110
            if num_tokens >= layer.next_cacheable.get(request.request_id, 0):
                return True
        return False


def with_decode_fast_path(manager: KVCacheManager) -> KVCacheManager | DecodeFastPath:
    """The manager in a `DecodeFastPath`; unchanged if it also manages layers of other classes (sliding windows)."""
    layers = manager.coordinator.single_type_managers
    own = [layer for layer in layers if isinstance(layer, LayerManager)]
    return DecodeFastPath(manager, own) if len(own) == len(layers) else manager
