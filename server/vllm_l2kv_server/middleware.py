"""Refuses on other endpoints what ours refuse themselves.

Our fields, because vLLM ignores those it does not know: a `kv_keep_ratio` on `/v1/responses` would silently keep a full
cache. And bodies of a shape that ends the server, because they would do so from there as well.
"""

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError

from vllm_l2kv.params import FIELD_NAMES, PREFIX
from vllm_l2kv_server.body import check_shape, may_be_unwieldy
from vllm_l2kv_server.body_bound import read_body, replay

COMPRESSING_PATHS = ("/v1/chat/completions", "/v1/completions")


class ForeignBodiesMiddleware:
    """Pure ASGI: reads the JSON bodies of POST requests to other paths and hands everything on as it came."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 400 itself, or lets the app answer."""
        if not _is_json_elsewhere(scope):
            await self.app(scope, receive, send)
            return
        messages = await read_body(receive) or []
        try:
            _check(b"".join(message.get("body", b"") for message in messages))
        except VLLMValidationError as error:
            answer = create_error_response(error)
            await JSONResponse(answer.model_dump(), status_code=answer.error.code)(scope, receive, send)
        else:
            await self.app(scope, replay(messages, receive), send)


def _is_json_elsewhere(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path not in COMPRESSING_PATHS and "json" in Headers(scope=scope).get("content-type", "")


def _check(body: bytes) -> None:
    """Parses a body only if it could hold what is refused.

    Raises:
        VLLMValidationError: Unwieldy, or one of our fields stands at the top level with a value.
    """
    if f'"{PREFIX}'.encode() not in body and not may_be_unwieldy(body):
        return
    try:
        parsed: Any = json.loads(body)
    except (ValueError, RecursionError):
        return  # the endpoint answers 400 in its own words
    check_shape(parsed)
    fields = parsed if isinstance(parsed, dict) else {}
    for name in FIELD_NAMES:
        if fields.get(name) is not None:
            raise VLLMValidationError(f"{name} works on POST {' and '.join(COMPRESSING_PATHS)} only.", parameter=name)
