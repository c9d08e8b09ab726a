"""Parsing of request bodies, with 400 for those that vLLM does not handle.

FastAPI answers some of them with 400 in another format, and vLLM answers others (lone surrogates, integers beyond 64
bits) with 500. Some end the server: deep nesting crashes the engine core, and millions of bad values fill the memory.
"""

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from vllm.exceptions import VLLMValidationError

MAX_DEPTH = 128
"""Levels of arrays and objects. Python's parser recurses once per level, and so does pickle on the way to the workers.
If pickle fails, the engine core ends, and the server ends with it.
"""

MAX_VALUES = 30_000
"""Items of arrays and objects in a body, without token ids. A bad item can cause 15 pydantic errors of 24 kB."""

TOKEN_FIELDS = ("prompt", "tokens", "token_ids")
"""Fields whose names end so hold token ids, in a list or in a list of lists."""

MAX_DIGITS = len(str(2**64))
LONG_INTEGER = re.compile(rb"\d{19}")


class NotJSONError(VLLMValidationError):
    """The body is not JSON."""


PARSED = "vllm_l2kv.body"
"""Key of an ASGI scope. Its value is a body that the middleware has parsed, so that no body is parsed twice."""


def parse_body(body: bytes, **arguments: Any) -> Any:
    """Returns the JSON value of a body; an integer that does not fit into a message to the engine becomes infinite.

    Args:
        body: UTF-8, UTF-16 or UTF-32.
        arguments: Further arguments of `json.loads`.

    Raises:
        NotJSONError: Neither JSON nor Unicode; answered with 400.
        VLLMValidationError: Nested too deeply, too many values, or a lone surrogate, which JSON can hold and UTF-8
            cannot; answered with 400.
    """
    # Token ids are short integers, so a prompt takes the fast path.
    may_be_long = LONG_INTEGER.search(body) or not is_utf8(body)
    try:
        value = json.loads(body, parse_int=_integer if may_be_long else None, **arguments)
    except RecursionError:
        raise too_deep() from None
    except UnicodeError as error:
        raise NotJSONError(f"The body is not Unicode text: {error}") from None
    except json.JSONDecodeError as error:
        raise NotJSONError(f"The body is not JSON: {error}") from None
    if rb"\ud" in body.lower() and not _is_unicode(value):
        raise VLLMValidationError("The body is not Unicode text: it has half of a surrogate pair.")
    if may_be_unwieldy(body):
        check_shape(value)
    return value


def may_be_unwieldy(body: bytes) -> bool:
    """Whether `check_shape` could refuse a body, by a count of its brackets and commas."""
    return body.count(b"[") + body.count(b"{") > MAX_DEPTH or body.count(b",") >= MAX_VALUES


def is_utf8(body: bytes) -> bool:
    """Whether a JSON parser reads a body as UTF-8, and not as UTF-16 or UTF-32."""
    return json.detect_encoding(body).startswith("utf-8")


def check_shape(value: Any) -> None:
    """Refuses a value that is nested too deeply or holds too many values; walks level by level, without recursion.

    Raises:
        VLLMValidationError: Answered with 400.
    """
    level, num_values = [_without_tokens(value)], 0
    for _ in range(MAX_DEPTH):
        items = [item for parent in level for item in (parent.values() if isinstance(parent, dict) else parent)]
        num_values += len(items)
        if num_values > MAX_VALUES:
            raise VLLMValidationError(f"The body holds more than {MAX_VALUES} values, token ids not counted.")
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise too_deep()


def too_deep() -> VLLMValidationError:
    """Returns the error that vLLM's handlers answer with 400."""
    return VLLMValidationError(f"The body is nested too deeply: more than {MAX_DEPTH} levels.")


def _without_tokens(value: Any) -> list[Any] | dict[str, Any]:
    """Returns the items of a body, without the integers of its token lists."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else []
    return {name: _no_integers(field) if name.endswith(TOKEN_FIELDS) else field for name, field in value.items()}


def _no_integers(value: Any) -> Any:
    """Returns a list without its integers and those of the lists in it."""
    if not isinstance(value, list):
        return value
    items = [item for item in value if type(item) is not int]
    if len(items) > MAX_VALUES:
        return items  # too many already
    return [[token for token in item if type(token) is not int] if isinstance(item, list) else item for item in items]


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        return False
    return True


def _integer(digits: str) -> int | float:
    """Converts an integer beyond 64 bits to infinity, which the check of its field then refuses."""
    value = int(digits) if len(digits) <= MAX_DIGITS else None
    if value is not None and -(2**63) <= value < 2**64:
        return value
    return -math.inf if digits.startswith("-") else math.inf


class _ParsedRequest(Request):
    """A request that parses its own body."""

    async def json(self) -> Any:
        if not hasattr(self, "_value"):
            self._value = self.scope[PARSED] if PARSED in self.scope else parse_body(await self.body())
        return self._value


class CheckedBodyRoute(APIRoute):
    """A route whose JSON body is parsed by `parse_body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns a handler that parses the body before FastAPI does, since FastAPI hides the errors of `json()`."""
        answer = super().get_route_handler()

        async def parse_and_answer(request: Request) -> Response:
            request = _ParsedRequest(request.scope, request.receive)
            try:
                body = await request.body()
            except ClientDisconnect:
                return Response(status_code=400)  # for the log; the client has disconnected
            if "json" in request.headers.get("content-type", "") and body:
                await request.json()
            return await answer(request)

        return parse_and_answer
