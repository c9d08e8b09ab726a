"""Per-request state that the middleware passes to the engine client, beside vLLM's own request objects."""

from contextvars import ContextVar
from dataclasses import dataclass, field

from vllm_l2kv.params import FieldValue
from vllm_l2kv_server.usage import UsageBox


@dataclass(frozen=True)
class ChatDocument:
    """The document of a chat, as its client names it.

    Attributes:
        num_messages: The document ends after this many messages.
        num_given: Number of messages in the request, for endpoints where vLLM turns them into other messages before it
            renders them; `None` elsewhere.
    """

    num_messages: int
    num_given: int | None = None


@dataclass(frozen=True)
class Compression:
    """What one HTTP request asks of the KV cache, and the numbers that the engine reports for it.

    Attributes:
        fields: Checked `kv_` fields of the body, from the top level or from `vllm_xargs`.
        document: The document of its chat or chats, if the request names it by messages.
        box: Collects the numbers of every prompt that the request sends to the engine.
    """

    fields: dict[str, FieldValue]
    document: ChatDocument | None = None
    box: UsageBox = field(default_factory=UsageBox)


current: ContextVar[Compression | None] = ContextVar("current", default=None)
"""Compression of the HTTP request being answered; `None` for one whose numbers are not reported."""
