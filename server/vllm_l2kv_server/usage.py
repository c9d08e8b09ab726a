"""The numbers of one HTTP request: gathered while the engine answers it, put into the answer's `usage`."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from vllm_l2kv.params import USAGE_KEY
from vllm_l2kv.prompt_usage import REASON

Numbers = dict[str, Any]


class UsageBox:
    """Collects what the engine says about the prompts of one HTTP request."""

    def __init__(self) -> None:
        self._prompts: list[dict[int, Numbers]] = []

    def new_prompt(self) -> dict[int, Numbers]:
        """A place for the latest numbers of one prompt's choices, by choice index."""
        self._prompts.append({})
        return self._prompts[-1]

    def total(self) -> Numbers | None:
        """Sum over prompts, or `None` if the engine said nothing. Reasons follow each other, each of them once.

        The choices of a prompt (`n > 1`) share it and keep the same number of its tokens, so it counts once; a choice
        that ended before it was compacted does not hide the others.
        """
        spoken = [
            max(prompt.values(), key=lambda numbers: numbers["evicted_tokens"]) for prompt in self._prompts if prompt
        ]
        if not spoken:
            return None
        total: Numbers = {key: sum(numbers[key] for numbers in spoken) for key in spoken[0] if key != REASON}
        reasons = dict.fromkeys(numbers[REASON] for numbers in spoken if REASON in numbers)
        return {**total, REASON: " ".join(reasons)} if reasons else total


current_box: ContextVar[UsageBox | None] = ContextVar("current_box", default=None)
"""The box of the HTTP request being answered; `None` where nobody will read the numbers."""


async def record(outputs: AsyncIterator[Any], prompt: dict[int, Numbers]) -> AsyncIterator[Any]:
    """Passes a prompt's engine outputs on, with our numbers taken out of them.

    Args:
        outputs: What the engine client generates, an async generator.
        prompt: Where the latest numbers go, by choice index.

    Yields:
        The same outputs. vLLM would show `kv_transfer_params` to the client, so they leave empty.
    """
    # Closed with us, at once: that is how vLLM learns that the client has gone.
    async with aclosing(outputs):  # type: ignore[type-var]
        async for output in outputs:
            numbers = (output.kv_transfer_params or {}).get(USAGE_KEY)
            if numbers is not None:
                prompt.update({choice.index: numbers for choice in output.outputs})
                output.kv_transfer_params = None
            yield output


def add_usage(response: Response | None, box: UsageBox) -> Response | None:
    """Puts the box's numbers into the `usage` of vLLM's response, be it one JSON body or a stream."""
    if isinstance(response, StreamingResponse):
        response.body_iterator = _add_to_stream(response.body_iterator, box)
    elif isinstance(response, JSONResponse):
        response.body = _add_to_json(bytes(response.body), box)
        response.headers["content-length"] = str(len(response.body))
    return response


async def _add_to_stream(chunks: Any, box: UsageBox) -> AsyncIterator[str | bytes]:
    async with aclosing(chunks):
        async for chunk in chunks:
            yield _add_to_event(chunk, box) if isinstance(chunk, str) else chunk


def _add_to_event(event: str, box: UsageBox) -> str:
    """One server-sent event; vLLM yields each as one string."""
    if not event.startswith("data: {") or '"usage":' not in event:
        return event
    data = event.removeprefix("data: ").rstrip().encode()
    return f"data: {_add_to_json(data, box).decode()}\n\n"


def _add_to_json(body: bytes, box: UsageBox) -> bytes:
    numbers = box.total()
    answer = json.loads(body) if numbers is not None else None
    if not isinstance(answer, dict) or not isinstance(answer.get("usage"), dict):
        return body
    answer["usage"][USAGE_KEY] = numbers
    # As Starlette and vLLM write it.
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
