"""Middleware for every request, whatever its endpoint, method and media type.

It checks the bytes of the body, reads the `kv_` fields, and writes the numbers of the compression into the answer. It
covers all endpoints, because vLLM's routes do not know the fields, and a dangerous body can end the server at any of
them.
"""

from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.exceptions import VLLMValidationError

from vllm_l2kv.settings import Settings
from vllm_l2kv_server.body import PARSED
from vllm_l2kv_server.body_bound import has_body, read_body, replay
from vllm_l2kv_server.context import current
from vllm_l2kv_server.refusal import path_of, refusal
from vllm_l2kv_server.request_fields import parse_if_needed, read_compression
from vllm_l2kv_server.usage import UsageBox, UsageWriter

RESPONSES_PATH = "/v1/responses"


class CompressionMiddleware:
    """Pure ASGI: reads the fields of a request, and adds the numbers to its answer.

    The app's state has the engine's settings (`kv_settings`) and, if vLLM stores responses, their numbers
    (`kv_stored_numbers`).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 400 itself, or lets the app answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, state = path_of(scope), scope["app"].state
        compression = None
        if has_body(scope):
            messages = await read_body(receive) or []
            receive = replay(messages, receive)
            body = b"".join(message.get("body", b"") for message in messages)
            try:
                value = parse_if_needed(body)
                compression = read_compression(value, path, getattr(state, "kv_settings", None) or Settings())
            except VLLMValidationError as error:
                await refusal(error, scope)(scope, receive, send)
                return
            if value is not None:
                scope[PARSED] = value
        stored: dict[str, UsageBox] | None = getattr(state, "kv_stored_numbers", None)
        if compression is not None:
            send = UsageWriter(send, compression.box, stored)
        elif stored and (box := stored.get(path.removeprefix(f"{RESPONSES_PATH}/"))) is not None:
            send = UsageWriter(send, box)
        token = current.set(compression)
        try:
            await self.app(scope, receive, send)
        finally:
            current.reset(token)
