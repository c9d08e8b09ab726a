"""Keeps requests in flight: sent at planned times, or by a fixed number of clients."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from time import perf_counter
from typing import NamedTuple

from vllm_l2kv.tools.bench.client import Answer
from vllm_l2kv.tools.bench.load import Load, Planned

Ask = Callable[[Planned], Awaitable[Answer]]


class Outcome(NamedTuple):
    """A request and its answer."""

    planned: Planned
    answer: Answer
    late_s: float
    """Seconds from the planned to the actual start; 0 without planned times."""


async def drive(load: Load, requests: Iterable[Planned], ask: Ask, done: Callable[[Outcome], None]) -> None:
    """Sends requests and waits for all answers.

    Args:
        load: How the requests are sent.
        requests: The requests; consumed one by one when each is sent.
        ask: Sends one request.
        done: Called with each outcome, in the order in which requests end.
    """
    begin = perf_counter()

    async def send(request: Planned) -> None:
        late_s = perf_counter() - begin - request.due_s if load.rate is not None else 0.0
        done(Outcome(request, await ask(request), late_s))

    async def wait_and_ask() -> None:
        for request in waiting:  # the clients share one iterator
            if load.duration_s is not None and perf_counter() - begin > load.duration_s:
                return
            await send(request)

    waiting = iter(requests)
    async with asyncio.TaskGroup() as group:
        if load.rate is None:
            for _ in range(load.concurrency):
                group.create_task(wait_and_ask())
            return
        for request in waiting:
            await asyncio.sleep(max(begin + request.due_s - perf_counter(), 0))
            group.create_task(send(request))
