"""A bound on the length of request bodies; vLLM and uvicorn have none."""

from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import GracefulHTTPError

from vllm_l2kv_server.refusal import refusal
from vllm_l2kv_server.serve_options import MAX_BODY_OPTION

BYTES_PER_MIB = 2**20


class BodyBoundMiddleware:
    """Pure ASGI: reads a body before the app does, and answers 413 itself if it is too long.

    The bytes received are counted. A `Content-Length` beyond the bound only saves reading them.
    """

    def __init__(self, app: ASGIApp, max_mib: int) -> None:
        self.app = app
        self.max_mib = max_mib

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 413 itself, or lets the app answer."""
        if not has_body(scope):
            await self.app(scope, receive, send)
            return
        max_bytes = self.max_mib * BYTES_PER_MIB
        messages = None if _announced_bytes(scope) > max_bytes else await read_body(receive, max_bytes)
        if messages is None:
            bound = f"{self.max_mib} MiB, the bound that {MAX_BODY_OPTION} of `vllm-l2kv serve` sets."
            error = GracefulHTTPError(f"The body is longer than {bound}", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            await refusal(error, scope)(scope, receive, send)
        else:
            await self.app(scope, replay(messages, receive), send)


async def read_body(receive: Receive, max_bytes: int | None = None) -> list[Message] | None:
    """Returns the ASGI messages of a body, or `None` if it is longer than `max_bytes`."""
    messages, num_bytes = [], 0
    while True:
        message = await receive()
        messages.append(message)
        num_bytes += len(message.get("body", b""))
        if max_bytes is not None and num_bytes > max_bytes:
            return None
        if not message.get("more_body", False):
            return messages


def replay(messages: list[Message], receive: Receive) -> Receive:
    """Returns a `receive` that yields the messages already read, then the ones after them."""
    unread = iter(messages)

    async def replayed() -> Message:
        message = next(unread, None)
        return await receive() if message is None else message

    return replayed


def has_body(scope: Scope) -> bool:
    """Whether an HTTP request announces a body; without these headers uvicorn treats it as empty."""
    if scope["type"] != "http":
        return False
    headers = Headers(scope=scope)
    return "content-length" in headers or "transfer-encoding" in headers


def _announced_bytes(scope: Scope) -> int:
    announced = Headers(scope=scope).get("content-length", "")
    return int(announced) if announced.isdecimal() else 0
