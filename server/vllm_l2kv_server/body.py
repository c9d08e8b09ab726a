"""Bodies that no handler should meet: told apart before anything of vLLM's sees them, and answered with 400.

Some would be answered with 400 in another shape by FastAPI, others (lone surrogates, integers beyond 64 bits) with 500
by vLLM, and some would end the server: deep ones its engine core, those with millions of bad values its memory.
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
"""Arrays and objects inside each other. Python's parser, and pickle on the way to the engine's workers, count levels
against the depth of their stack; when pickle is the one that fails, the engine core ends and the server with it.
"""

MAX_VALUES = 30_000
"""Items of arrays and objects in a body, apart from token ids. Each bad one can become 15 errors of pydantic, 24 kB."""

TOKEN_FIELDS = ("prompt", "tokens", "token_ids")
"""How the names of fields end that hold token ids, in a list or in a list of lists."""

MAX_DIGITS = len(str(2**64))
LONG_INTEGER = re.compile(rb"\d{19}")


class NotJSONError(VLLMValidationError):
    """A body that no JSON parser takes."""


PARSED = "vllm_l2kv.body"
"""Where a scope of ASGI holds the value of a body that was parsed on the way, so that it is parsed once."""


def parse_body(body: bytes, **arguments: Any) -> Any:
    """The JSON value of a body; an integer that no message to the engine can hold becomes infinite.

    Args:
        body: UTF-8, UTF-16 or UTF-32.
        arguments: More of those of `json.loads`.

    Raises:
        NotJSONError: Neither JSON nor Unicode; answered with 400.
        VLLMValidationError: Nested too deeply, too many values, or a lone surrogate, which JSON can hold and UTF-8
            cannot; answered with 400.
    """
    # Token ids are short, so prompts keep the fast path.
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
    """Whether a body has the brackets or commas that `check_shape` could refuse, at the cost of counting them."""
    return body.count(b"[") + body.count(b"{") > MAX_DEPTH or body.count(b",") >= MAX_VALUES


def is_utf8(body: bytes) -> bool:
    """Whether a JSON parser reads a body as UTF-8; the others that JSON allows are UTF-16 and UTF-32."""
    return json.detect_encoding(body).startswith("utf-8")


def check_shape(value: Any) -> None:
    """Refuses what is nested too deeply or holds too many values, level by level, without recursion.

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
    """The error for which vLLM's handlers answer 400."""
    return VLLMValidationError(f"The body is nested too deeply: more than {MAX_DEPTH} levels.")


def _without_tokens(value: Any) -> list[Any] | dict[str, Any]:
    """A body as something to walk through, the integers of its token lists left out."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else []
    return {name: _no_integers(field) if name.endswith(TOKEN_FIELDS) else field for name, field in value.items()}


def _no_integers(value: Any) -> Any:
    """A list without its integers and those of the lists in it."""
    if not isinstance(value, list):
        return value
    items = [item for item in value if type(item) is not int]
    if len(items) > MAX_VALUES:
        return items  # too many, whatever is in them
    return [[token for token in item if type(token) is not int] if isinstance(item, list) else item for item in items]


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        return False
    return True


def _integer(digits: str) -> int | float:
    """An integer beyond 64 bits becomes infinite, and so meets the check of its own field."""
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
        """As FastAPI's; parses first, because FastAPI would hide what `json()` raises."""
        answer = super().get_route_handler()

        async def parse_and_answer(request: Request) -> Response:
            request = _ParsedRequest(request.scope, request.receive)
            try:
                body = await request.body()
            except ClientDisconnect:
                return Response(status_code=400)  # for the log; nobody is there to read it
            if "json" in request.headers.get("content-type", "") and body:
                await request.json()
            return await answer(request)

        return parse_and_answer
