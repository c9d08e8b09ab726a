"""The numbers of one HTTP request: gathered while the engine answers it, put into the answer's `usage`."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

from vllm_l2kv.messages.usage import REASON, USAGE_KEY, take_usage

Numbers = Mapping[str, Any]
DATA = b"data: "
EVENT_END = b"\n\n"


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


async def record(outputs: AsyncIterator[Any], prompt: dict[int, Numbers]) -> AsyncIterator[Any]:
    """Passes a prompt's engine outputs on, with our numbers taken out of them.

    Args:
        outputs: What the engine client generates, an async generator.
        prompt: Where the latest numbers go, by choice index.

    Yields:
        The same outputs.
    """
    # Closed with us, at once: that is how vLLM learns that the client has gone.
    async with aclosing(outputs):  # type: ignore[type-var]
        async for output in outputs:
            numbers = take_usage(output)
            if numbers is not None:
                prompt.update({choice.index: numbers for choice in output.outputs})
            yield output


class UsageWriter:
    """A `send` of ASGI that puts the box's numbers into the `usage` of an answer, be it one JSON body or a stream.

    Args:
        send: Where the answer goes.
        box: Read when the `usage` passes.
        stored: Where the box is noted under the id of a response that vLLM stores; `None` if it stores none.
    """

    def __init__(self, send: Send, box: UsageBox, stored: dict[str, UsageBox] | None = None) -> None:
        self._send = send
        self._box = box
        self._stored = stored
        self._start: Message | None = None  # held back, since a JSON body's length is going to change
        self._is_stream = False
        self._unsent = b""

    async def __call__(self, message: Message) -> None:
        """Sends one message of the answer, or holds it back until it is complete."""
        if message["type"] == "http.response.start":
            media_type = Headers(raw=message["headers"]).get("content-type", "").partition(";")[0]
            self._is_stream = media_type == "text/event-stream"
            if media_type == "application/json":
                self._start = message
                return
        elif message["type"] == "http.response.body" and (self._is_stream or self._start is not None):
            message = {**message, "body": self._unsent + message.get("body", b"")}
            is_last = not message.get("more_body", False)
            if self._start is None:
                message["body"], self._unsent = self._stream_so_far(message["body"], is_last)
            elif is_last:
                message["body"] = self._with_usage(message["body"])
                await self._send(_with_length(self._start, len(message["body"])))
            else:
                self._unsent = message["body"]
                return
        await self._send(message)

    def _stream_so_far(self, body: bytes, is_last: bool) -> tuple[bytes, bytes]:
        """Complete events of a stream with their numbers, and the beginning of the next one."""
        events, end, rest = body.rpartition(EVENT_END)
        if is_last:
            events, end, rest = body, b"", b""
        if b'"usage":' in events:
            events = EVENT_END.join(map(self._event, events.split(EVENT_END)))
        return events + end, rest

    def _event(self, event: bytes) -> bytes:
        """One server-sent event; some APIs name its kind in a line before the data."""
        lines = event.split(b"\n")
        return b"\n".join(
            DATA + self._with_usage(line.removeprefix(DATA)) if line.startswith(DATA) else line for line in lines
        )

    def _with_usage(self, body: bytes) -> bytes:
        """A JSON answer, or the data of an event, with numbers wherever `usage` is given."""
        if b'"usage":' not in body:
            return body
        numbers = self._box.total()
        if numbers is None and self._stored is None:
            return body
        try:
            answer = json.loads(body)
        except ValueError:
            return body
        # An event of the Responses API holds the whole response.
        parts = [part for part in (answer, _get(answer, "response")) if isinstance(part, dict)]
        for part in parts:
            if self._stored is not None and part.get("object") == "response":
                self._stored[part["id"]] = self._box
        usages = [part["usage"] for part in parts if isinstance(part.get("usage"), dict)]
        if numbers is None or not usages:
            return body
        for usage in usages:
            usage[USAGE_KEY] = numbers
        # As Starlette and vLLM write it.
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


def _with_length(start: Message, num_bytes: int) -> Message:
    headers = MutableHeaders(raw=list(start["headers"]))
    headers["content-length"] = str(num_bytes)
    return {**start, "headers": headers.raw}


def _get(answer: Any, name: str) -> Any:
    return answer.get(name) if isinstance(answer, dict) else None
