"""Refuses our fields where nobody would read them.

vLLM ignores fields it does not know, so a `kv_keep_ratio` on `/v1/responses` would silently keep a full cache.
"""

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from vllm_l2kv.params import FIELD_NAMES, PREFIX

COMPRESSING_PATHS = ("/v1/chat/completions", "/v1/completions")
MAX_BODY_BYTES = 32 * 2**20
"""A longer body is passed on unread; it is some upload, not a prompt."""


class MisplacedFieldsMiddleware:
    """Pure ASGI: reads the JSON bodies of POST requests to other paths and hands everything on as it came."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 400 itself, or lets the app answer."""
        if not _is_json_elsewhere(scope):
            await self.app(scope, receive, send)
            return
        messages = await _read(receive)
        field = _misplaced_field(b"".join(message.get("body", b"") for message in messages))
        if field is None:
            await self.app(scope, _replay(messages, receive), send)
        else:
            error = create_error_response(f"{field} works on POST {' and '.join(COMPRESSING_PATHS)} only.", param=field)
            await JSONResponse(error.model_dump(), status_code=error.error.code)(scope, receive, send)


def _is_json_elsewhere(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path not in COMPRESSING_PATHS and "json" in Headers(scope=scope).get("content-type", "")


async def _read(receive: Receive) -> list[Message]:
    """The messages of a body, up to the bound."""
    messages, num_bytes = [], 0
    while num_bytes <= MAX_BODY_BYTES:
        message = await receive()
        messages.append(message)
        num_bytes += len(message.get("body", b""))
        if not message.get("more_body", False):
            break
    return messages


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives what was read, then goes on where that ended."""
    unread = iter(messages)

    async def replay() -> Message:
        message = next(unread, None)
        return await receive() if message is None else message

    return replay


def _misplaced_field(body: bytes) -> str | None:
    """The first of our fields that stands at the top level of a JSON object with a value."""
    if len(body) > MAX_BODY_BYTES or f'"{PREFIX}'.encode() not in body:
        return None
    try:
        parsed: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the endpoint answers 400 in its own words
    if not isinstance(parsed, dict):
        return None
    return next((name for name in FIELD_NAMES if parsed.get(name) is not None), None)
