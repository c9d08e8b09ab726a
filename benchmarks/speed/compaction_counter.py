"""Counts compactions and their device time in an engine in this process; counts nothing in stock vLLM."""

import time
from collections.abc import Iterable
from typing import Any, Self

from benchmarks.speed.engines import scheduler_of


class CompactionCounter:
    """Replaces the engine's counter of statistics, and passes all calls on to it.

    Attributes:
        num_compactions: Number of compactions so far.
        seconds: For each report, when it came and the device time in it.
    """

    def __init__(self, llm: Any) -> None:
        self._scheduler = scheduler_of(llm)
        self._counter = getattr(self._scheduler, "_stats_counter", None)
        self.num_compactions = 0
        self.seconds: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._counter, name)

    def __enter__(self) -> Self:
        if self._counter is not None:
            self._scheduler._stats_counter = self
        return self

    def __exit__(self, *args: object) -> None:
        if self._counter is not None:
            self._scheduler._stats_counter = self._counter

    def compacted(self, *args: Any) -> None:
        """Counts a compaction."""
        self.num_compactions += 1
        self._counter.compacted(*args)

    def measured(self, seconds: Iterable[float]) -> None:
        """Records device times."""
        now = time.perf_counter()
        self.seconds += [(now, each) for each in seconds]
        self._counter.measured(seconds)

    def seconds_since(self, seconds_ago: float) -> list[float]:
        """Returns the device times that were reported in the last `seconds_ago` seconds."""
        begin = time.perf_counter() - seconds_ago
        return [seconds for reported, seconds in self.seconds if reported >= begin]
