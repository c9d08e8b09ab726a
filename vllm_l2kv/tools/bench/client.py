"""One streamed completion, timed.

It uses httpx: the openai client builds an object for every event, which takes several times as long as httpx and json,
on a machine whose CPUs the server may need.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httpx

MAX_MESSAGE = 200
"""Characters of an error message that are kept, so that errors of one kind are counted together."""


@dataclass
class Answer:
    """The outcome of a request; times in seconds of `time.perf_counter`."""

    start_s: float
    end_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    """Time of each event with new tokens: usually one token, more if the client is late."""
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    """HTTP status or class of the error, then the message; `None` if the request succeeded."""


class RequestError(Exception):
    """The server refused the request, or its answer is incomplete."""


def body_of(model: str, prompt: list[int], num_output_tokens: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a request for exactly `num_output_tokens` tokens."""
    exact = {"max_tokens": num_output_tokens, "min_tokens": num_output_tokens, "ignore_eos": True}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, "prompt": prompt, "temperature": 0, **exact, **stream, **fields}


async def ask(http: httpx.AsyncClient, body: Mapping[str, Any], timeout_s: float) -> Answer:
    """Sends one request and reads its answer to the end; errors are put into `Answer.error`."""
    answer = Answer(perf_counter())
    try:
        async with asyncio.timeout(timeout_s):
            await _read(http, body, answer)
        _check(body, answer.usage)
    except RequestError as error:
        answer.error = str(error)[:MAX_MESSAGE]
    except (TimeoutError, httpx.TimeoutException):
        answer.error = f"timeout after {timeout_s:g} s"
    except (httpx.HTTPError, httpx.StreamError, ValueError) as error:
        answer.error = f"{type(error).__name__} {error}".strip()[:MAX_MESSAGE]
    answer.end_s = perf_counter()
    return answer


async def _read(http: httpx.AsyncClient, body: Mapping[str, Any], answer: Answer) -> None:
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise RequestError(f"{response.status_code} {_message((await response.aread()).decode(errors='replace'))}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RequestError(f"{event['error'].get('code', '')} {event['error'].get('message', '')}".strip())
            if event.get("choices"):
                answer.times_s.append(perf_counter())
            answer.usage = event.get("usage") or answer.usage


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()


def _check(body: Mapping[str, Any], usage: Mapping[str, Any]) -> None:
    """Raises `RequestError` for an answer that is not what was asked for, so that it counts as failed."""
    if not usage:
        raise RequestError("the answer has no usage")
    if (given := usage.get("completion_tokens")) != body["max_tokens"]:
        raise RequestError(f"the answer has {given} tokens instead of {body['max_tokens']}")
    if "kv_keep_ratio" in body and "kv_cache" not in usage:
        raise RequestError("the usage has no kv_cache")
