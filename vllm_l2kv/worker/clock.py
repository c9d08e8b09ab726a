"""How long compactions take on a device, measured without waiting for it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch


class Clock(Protocol):
    """Measures spans of work."""

    def measure(self) -> AbstractContextManager[None]:
        """Measures what is done inside."""

    def take(self) -> list[float]:
        """Seconds of the spans that have ended since the last call."""


class HostClock:
    """For work that is done when the call returns."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measures what is done inside."""
        begin = time.perf_counter()
        yield
        self._seconds.append(time.perf_counter() - begin)

    def take(self) -> list[float]:
        """Seconds of the spans that have ended since the last call."""
        seconds, self._seconds = self._seconds, []
        return seconds


class CUDAClock:
    """For kernels on the current stream."""

    def __init__(self) -> None:
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measures what is launched inside."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._spans.append((begin, end))

    def take(self) -> list[float]:
        """Seconds of the spans that have ended since the last call; those under way come later."""
        seconds = []
        while self._spans and self._spans[0][1].query():  # type: ignore[no-untyped-call]
            begin, end = self._spans.popleft()
            seconds.append(begin.elapsed_time(end) / 1000)
        return seconds
