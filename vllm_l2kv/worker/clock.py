"""Measures how long compactions take on a device, without waiting for the device."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch


class Clock(Protocol):
    """Measures spans of work."""

    def measure(self) -> AbstractContextManager[None]:
        """Measures the work done in the context."""

    def take(self) -> list[float]:
        """Seconds of the spans that have ended since the last call."""


class HostClock:
    """A clock for work that is finished when the call returns."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measures the work done in the context."""
        begin = time.perf_counter()
        yield
        self._seconds.append(time.perf_counter() - begin)

    def take(self) -> list[float]:
        """Seconds of the spans that have ended since the last call."""
        seconds, self._seconds = self._seconds, []
        return seconds


class CUDAClock:
    """A clock for kernels on the current CUDA stream."""

    def __init__(self) -> None:
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measures the kernels launched in the context."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._spans.append((begin, end))

    def take(self) -> list[float]:
        """Seconds of the spans that have ended since the last call; later calls return those still running."""
        seconds = []
        while self._spans and self._spans[0][1].query():  # type: ignore[no-untyped-call]
            begin, end = self._spans.popleft()
            seconds.append(begin.elapsed_time(end) / 1000)
        return seconds
