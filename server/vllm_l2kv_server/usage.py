"""The numbers of one HTTP request: collected from the engine's outputs and written into the answer's `usage`."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

from vllm_l2kv.messages.usage import REASON, USAGE_KEY, memory_of_all, take_usage

Numbers = Mapping[str, Any]
SUMS = ("prompt_tokens", "kept_tokens", "evicted_tokens", "compactions")
MEMORY = "memory_ratio"
FOUND = "found_tokens"
BOUND = "max_tokens"
DATA = b"data: "
EVENT_END = b"\n\n"


class UsageBox:
    """Collects the numbers that the engine reports for the prompts of one HTTP request."""

    def __init__(self) -> None:
        self._prompts: list[dict[int, Numbers]] = []

    def new_prompt(self) -> dict[int, Numbers]:
        """Returns a dict for the latest numbers of one prompt's choices, by choice index."""
        self._prompts.append({})
        return self._prompts[-1]

    def total(self) -> Numbers | None:
        """Returns the sum over prompts, or `None` if the engine reported nothing.

        The choices of a prompt (`n > 1`) share it, so one of them counts: the one that evicted most and, among equals,
        the longest. The memory ratio is that of all prompts together. The bound on the answer's length is the smallest
        of the prompts' bounds. Each distinct reason is listed once.
        """
        prompts = [max(prompt.values(), key=_evicted_and_kept) for prompt in self._prompts if prompt]
        if not prompts:
            return None
        total: dict[str, Any] = {key: sum(numbers[key] for numbers in prompts) for key in SUMS}
        total[MEMORY] = memory_of_all(prompts)
        if found := [numbers[FOUND] for numbers in prompts if FOUND in numbers]:
            total[FOUND] = sum(found)
        if bounds := [numbers[BOUND] for numbers in prompts if BOUND in numbers]:
            total[BOUND] = min(bounds)
        if reasons := dict.fromkeys(numbers[REASON] for numbers in prompts if REASON in numbers):
            total[REASON] = " ".join(reasons)
        return total


async def record(outputs: AsyncIterator[Any], prompt: dict[int, Numbers]) -> AsyncIterator[Any]:
    """Yields a prompt's engine outputs and takes the numbers of the compression out of them.

    Args:
        outputs: The async generator of the engine client.
        prompt: Receives the latest numbers, by choice index.

    Yields:
        The same outputs.
    """
    # Closed together with this generator, so that vLLM aborts the request of a client that has disconnected.
    async with aclosing(outputs):  # type: ignore[type-var]
        async for output in outputs:
            numbers = take_usage(output)
            if numbers is not None:
                prompt.update({choice.index: numbers for choice in output.outputs})
            yield output


class UsageWriter:
    """An ASGI `send` that writes the box's numbers into the `usage` of an answer, either one JSON body or a stream.

    Args:
        send: Sends the answer on.
        box: Read when the `usage` is sent.
        stored: Receives the box under the id of a response that vLLM stores; `None` if vLLM stores no responses.
    """

    def __init__(self, send: Send, box: UsageBox, stored: dict[str, UsageBox] | None = None) -> None:
        self._send = send
        self._box = box
        self._stored = stored
        self._start: Message | None = None  # held back, since the length of a JSON body changes
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
        """Returns the complete events of a stream with their numbers, and the beginning of the next event."""
        events, end, rest = body.rpartition(EVENT_END)
        if is_last:
            events, end, rest = body, b"", b""
        if b'"usage":' in events:
            events = EVENT_END.join(map(self._event, events.split(EVENT_END)))
        return events + end, rest

    def _event(self, event: bytes) -> bytes:
        """Returns one server-sent event with its numbers; in some APIs a line with its type precedes the data."""
        lines = event.split(b"\n")
        return b"\n".join(
            DATA + self._with_usage(line.removeprefix(DATA)) if line.startswith(DATA) else line for line in lines
        )

    def _with_usage(self, body: bytes) -> bytes:
        """Returns a JSON answer, or the data of an event, with the numbers in each `usage`."""
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
        # The format of Starlette and vLLM.
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


def _with_length(start: Message, num_bytes: int) -> Message:
    headers = MutableHeaders(raw=list(start["headers"]))
    headers["content-length"] = str(num_bytes)
    return {**start, "headers": headers.raw}


def _evicted_and_kept(numbers: Numbers) -> tuple[int, int]:
    return numbers["evicted_tokens"], numbers["kept_tokens"]


def _get(answer: Any, name: str) -> Any:
    return answer.get(name) if isinstance(answer, dict) else None
