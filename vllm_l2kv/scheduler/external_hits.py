"""Rows of a prompt that a KV connector brings from elsewhere, and how many of them a request may take.

A connector knows whole prompts only. A request takes what lies before its first compaction and is compacted itself, as
after a prefill of its own.
"""

from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA
from vllm.v1.request import Request


class ExternalHits(SupportsHMA):
    """Wraps vLLM's KV connector. What is not about hits goes to the connector itself.

    vLLM asks a connector for rows whenever a request begins and has looked into the prefix cache of the GPU.

    Args:
        connector: vLLM's.
        bound: Tells how many tokens of a request's prompt may be there, uncompacted, when it begins.

    Attributes:
        connector: The wrapped one.
    """

    def __init__(self, connector: Any, bound: Callable[[Request], int]) -> None:
        self.connector = connector
        self._bound = bound

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connector, name)

    def request_finished_all_groups(self, *args: Any, **kwargs: Any) -> Any:
        """Same contract as upstream; vLLM takes a connector for one of several groups if its class has this."""
        return self.connector.request_finished_all_groups(*args, **kwargs)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Same contract as upstream: a whole prompt or nothing, since a sender sends no part of one."""
        num_tokens, is_async = self.connector.get_num_new_matched_tokens(request, num_computed_tokens)
        if num_tokens is not None and num_computed_tokens + num_tokens > self._bound(request):
            return 0, False
        return num_tokens, is_async
