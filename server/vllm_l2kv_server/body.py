"""Bodies that no handler should meet: told apart before anything of vLLM's sees them, and answered with 400.

Some would be answered with 400 in another shape by FastAPI, others (lone surrogates, integers beyond 64 bits) with 500
by vLLM.
"""

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from vllm.exceptions import VLLMValidationError

MAX_DIGITS = len(str(2**64))
LONG_INTEGER = re.compile(rb"\d{19}")


def parse_body(body: bytes) -> Any:
    """The JSON value of a body.

    Raises:
        VLLMValidationError: Not JSON, not Unicode, or nested too deeply; answered with 400.
    """
    try:
        value = _loads(body)
        if rb"\ud" in body.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise VLLMValidationError("The body is nested too deeply.") from None
    except UnicodeError as error:
        raise VLLMValidationError(f"The body is not Unicode text: {error}") from None
    except json.JSONDecodeError as error:
        raise VLLMValidationError(f"The body is not JSON: {error}") from None
    return value


def _loads(body: bytes) -> Any:
    # vLLM's messages to the engine hold 64-bit integers. Token ids are short, so prompts keep the fast path.
    return json.loads(body, parse_int=_integer if LONG_INTEGER.search(body) else None)


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
            self._value = parse_body(await self.body())
        return self._value


class CheckedBodyRoute(APIRoute):
    """A route whose JSON body is parsed by `parse_body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's; parses first, because FastAPI would hide what `json()` raises."""
        answer = super().get_route_handler()

        async def parse_and_answer(request: Request) -> Response:
            request = _ParsedRequest(request.scope, request.receive)
            if "json" in request.headers.get("content-type", "") and await request.body():
                await request.json()
            return await answer(request)

        return parse_and_answer
