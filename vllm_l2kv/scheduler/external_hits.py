"""Limits how many rows of a prompt a request may take from a KV connector.

A connector holds uncompressed rows. A request takes those before its first compaction, and is then compacted as after
its own prefill.
"""

from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA
from vllm.v1.request import Request


class ExternalHits(SupportsHMA):
    """Wraps vLLM's KV connector. Calls that do not concern hits go to the connector itself.

    Whenever a request begins, vLLM asks the connector for rows after looking into the GPU's prefix cache.

    Args:
        connector: vLLM's KV connector.
        bound: Returns how many tokens of a request's prompt it may take uncompacted.

    Attributes:
        connector: The wrapped connector.
    """

    def __init__(self, connector: Any, bound: Callable[[Request], int]) -> None:
        self.connector = connector
        self._bound = bound

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connector, name)

    def request_finished_all_groups(self, *args: Any, **kwargs: Any) -> Any:
        """Same contract as upstream; vLLM takes this method as a sign that the connector supports several groups."""
        return self.connector.request_finished_all_groups(*args, **kwargs)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Same contract as upstream: the whole prompt or nothing, since a sender cannot send part of a prompt."""
        num_tokens, is_async = self.connector.get_num_new_matched_tokens(request, num_computed_tokens)
        if num_tokens is not None and num_computed_tokens + num_tokens > self._bound(request):
            return 0, False
        return num_tokens, is_async
