"""Blocks that requests hold for others (`cache_manager.TailManager`), freed when a request lacks blocks."""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request

from vllm_l2kv.scheduler.cache_manager import TailManager, let_go_of_held


class HeldBlocks:
    """Wraps vLLM's `KVCacheManager` and frees held blocks where vLLM would preempt a request, or not admit one.

    Freed blocks stay findable until they are reused, after all that were freed before them.

    Attributes:
        manager: The wrapped manager.
    """

    def __init__(self, manager: Any, tails: list[TailManager]) -> None:
        self.manager = manager
        self._tails = tails

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)

    def allocate_slots(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """Same contract as upstream."""
        blocks: KVCacheBlocks | None = self.manager.allocate_slots(request, num_new_tokens, *args, **kwargs)
        if blocks is None and let_go_of_held(self._tails):
            blocks = self.manager.allocate_slots(request, num_new_tokens, *args, **kwargs)
        return blocks


def with_held_blocks(manager: Any) -> Any:
    """The manager in a `HeldBlocks`; unchanged if no manager holds any."""
    tails = [layer for layer in manager.coordinator.single_type_managers if isinstance(layer, TailManager)]
    return HeldBlocks(manager, tails) if tails else manager
