"""Load over HTTP: many clients at once, some of which disconnect early. A seed always makes the same requests."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
from http_server import Server, expected_usage
from usages import TINY_SHARE

from vllm_l2kv.policy import Intervals

RATIOS = (None, 1.0, 0.9, 0.5, 0.3, 0.1)
BUDGETS = (72, 100, 150)
"""At least as many as the protected rows."""
DOCUMENTS = (40, 97, 200)
"""Lengths of documents; all keep the same ratio."""
INTERVALS = Intervals(prompt=64, answer=16)
"""Intervals of the server."""
NUM_SHARED_OFFSETS = 3
"""Number of places in the text at which prompts with shared beginnings start. They share prefixes, documents, and the
rows that budgets leave.
"""
QUIET_SECONDS = 60


@dataclass(frozen=True)
class Mix:
    """The requests of clients.

    Attributes:
        concurrency: Clients at once.
        prompt_lengths: Fewest and most tokens of a prompt.
        answer_lengths: The same of an answer.
        priorities: vLLM's priorities; lower ones are served first.
        alike: Share of prompts that begin at one of a few places in the text; the others begin anywhere.
        documents: Share of requests with a document, where the prompt is longer.
        budgets: Share of requests with a budget.
        cut_off: Share of requests whose client disconnects early, unless the answer is complete before.
    """

    concurrency: int = 24
    prompt_lengths: tuple[int, int] = (1, 600)
    answer_lengths: tuple[int, int] = (1, 40)
    priorities: Sequence[int] = (0,)
    alike: float = 0.5
    documents: float = 0.25
    budgets: float = 0.25
    cut_off: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """A body for `/v1/completions`, and when its client disconnects.

    Attributes:
        max_events: Number of events after which the client closes a stream.
        max_seconds: Time after which the client closes the connection in any case.
    """

    body: dict[str, Any]
    max_events: int | None = None
    max_seconds: float | None = None

    @property
    def is_cut_off(self) -> bool:
        return self.max_events is not None or self.max_seconds is not None


@dataclass
class Answer:
    """What a client received.

    Attributes:
        status: `None` if the client disconnected before it.
        events: Events of a stream, or the whole body as the only one.
        is_complete: Whether the client received the end of the answer.
    """

    request: Request
    status: int | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    is_complete: bool = False

    @property
    def choices(self) -> list[dict[str, Any]]:
        return [choice for event in self.events for choice in event["choices"]]

    @property
    def token_ids(self) -> list[int]:
        return [token for choice in self.choices for token in choice["token_ids"]]

    @property
    def usages(self) -> list[dict[str, Any]]:
        return [event["usage"] for event in self.events if event.get("usage")]

    @property
    def is_compressed(self) -> bool:
        return self.num_compactions > 0

    @property
    def num_compactions(self) -> int:
        return self._number("compactions")

    @property
    def num_found(self) -> int:
        """Tokens of its prompt whose compressed rows were found."""
        return self._number("found_tokens")

    def _number(self, name: str) -> int:
        return self.usages[-1].get("kv_cache", {}).get(name, 0) if self.usages else 0


# --- what is asked


def make_requests(mix: Mix, num_requests: int, text_ids: Sequence[int]) -> list[Request]:
    random = Random(mix.seed)
    last_offset = len(text_ids) - mix.prompt_lengths[1]
    offsets = [random.randrange(last_offset) for _ in range(NUM_SHARED_OFFSETS)]
    requests = []
    for number in range(num_requests):
        offset = random.choice(offsets) if random.random() < mix.alike else random.randrange(last_offset)
        prompt = list(text_ids[offset : offset + random.randint(*mix.prompt_lengths)])
        body = _body(random, mix, f"{mix.seed}-{number}", prompt)
        requests.append(Request(body, **(_leaving(random, body) if random.random() < mix.cut_off else {})))
    return requests


def _body(random: Random, mix: Mix, request_id: str, prompt: list[int]) -> dict[str, Any]:
    body = {
        "request_id": request_id,
        "prompt": prompt,
        "max_tokens": random.randint(*mix.answer_lengths),
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "priority": random.choice(mix.priorities),
    }
    ratio = random.choice(RATIOS)
    if ratio is not None:
        body["kv_keep_ratio"] = ratio
    if random.random() < mix.budgets:
        body["kv_max_tokens"] = random.choice(BUDGETS)
    if random.random() < mix.documents and len(prompt) > DOCUMENTS[0]:
        length = random.choice([length for length in DOCUMENTS if length < len(prompt)])
        body |= {"kv_prefix_tokens": length, "kv_keep_ratio": 0.5}
    if random.random() < 0.2:
        body |= {"kv_protect_first": random.randint(0, 8), "kv_protect_last": random.randint(0, 64)}
    if random.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def _leaving(random: Random, body: dict[str, Any]) -> dict[str, Any]:
    """Closes streams after some tokens or, like other answers, at any time, often before the first token."""
    if "stream" in body and random.random() < 0.6:
        return {"max_events": random.randint(1, 6)}
    return {"max_seconds": random.uniform(0.005, 0.5)}


# --- asking


def ask_all(url: str, requests: Sequence[Request], concurrency: int) -> list[Answer]:
    """Returns answers in the order of the requests."""
    return asyncio.run(_ask_all(url, requests, concurrency))


async def _ask_all(url: str, requests: Sequence[Request], concurrency: int) -> list[Answer]:
    # The server closes connections after five idle seconds, and on a machine that pauses also one that was just reused.
    # So each request has its own connection.
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        turns = asyncio.Semaphore(concurrency)

        async def ask_in_turn(request: Request) -> Answer:
            async with turns:
                return await _ask(client, request)

        return await asyncio.gather(*map(ask_in_turn, requests))


async def _ask(client: httpx.AsyncClient, request: Request) -> Answer:
    answer = Answer(request)
    try:
        async with (
            asyncio.timeout(request.max_seconds),
            client.stream("POST", "/v1/completions", json=request.body) as response,
        ):
            answer.status = response.status_code
            await _read(response, answer)
    except TimeoutError:
        assert request.max_seconds is not None
    return answer


async def _read(response: httpx.Response, answer: Answer) -> None:
    """Reads to the end or to the request's bound; an early return closes the connection."""
    if response.status_code != 200 or "stream" not in answer.request.body:
        body = await response.aread()
        answer.events.append(json.loads(body))
        answer.is_complete = True
        return
    async for data in _stream(response):
        assert not answer.is_complete, "a stream continues after its end"
        if data == "[DONE]":
            answer.is_complete = True
        else:
            answer.events.append(json.loads(data))
            if len(answer.events) == answer.request.max_events:
                return


async def _stream(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line:
            yield line.removeprefix("data: ")


# --- what must come back


def check_answers(answers: Sequence[Answer]) -> None:
    """Checks that each client that stayed has exactly one answer, the one to its own request."""
    for answer in answers:
        assert answer.status in ((200, None) if answer.request.is_cut_off else (200,)), answer
        assert answer.is_complete or answer.request.is_cut_off, answer
        if answer.is_complete:
            _check_complete(answer)


def _check_complete(answer: Answer) -> None:
    body = answer.request.body
    assert {event["id"] for event in answer.events} == {f"cmpl-{body['request_id']}"}, answer
    prompts = [choice["prompt_token_ids"] for choice in answer.choices if choice.get("prompt_token_ids")]
    assert prompts == [body["prompt"]], answer
    reasons = [choice["finish_reason"] for choice in answer.choices if choice["finish_reason"]]
    assert reasons == ["length"], answer
    assert len(answer.token_ids) == body["max_tokens"], answer
    (usage,) = answer.usages
    assert usage["prompt_tokens"] == len(body["prompt"]), answer
    assert usage["completion_tokens"] == body["max_tokens"], answer
    assert usage.get("kv_cache") == _kv_cache(body, answer.num_found), answer


def _kv_cache(body: dict[str, Any], found: int) -> dict[str, int | str] | None:
    """Returns the numbers of an answer, preempted or not, that continued from another request's compaction."""
    params = {name.removeprefix("kv_"): value for name, value in body.items() if name.startswith("kv_")}
    if not params:
        return None
    return expected_usage(len(body["prompt"]), body["max_tokens"], INTERVALS, found, TINY_SHARE, **params)


def check_again(url: str, answers: Sequence[Answer]) -> None:
    """Checks that each request, alone on the idle server, gets the same tokens."""
    requests = [Request(answer.request.body) for answer in answers]
    for before, again in zip(answers, ask_all(url, requests, 1), strict=True):
        assert again.token_ids == before.token_ids, before


# --- what the server says


def num_preemptions(server: Server) -> int:
    return int(server.metrics()["vllm:num_preemptions_total"])


def wait_until_idle(server: Server) -> None:
    """Waits until no request runs or waits, and no block is held."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    deadline = time.monotonic() + QUIET_SECONDS
    while any(busy := {name: server.metrics()[name] for name in names}.values()):
        assert time.monotonic() < deadline, busy
        time.sleep(0.2)


def resident_mib(server: Server) -> Counter[str]:
    """Returns the memory of the server's processes, by their titles."""
    mib: Counter[str] = Counter()
    for process in server.family():
        mib[process.name()] += process.memory_info().rss / 2**20
    return mib
