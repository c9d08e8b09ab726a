"""Progress of a long command: one line that is updated in place on a terminal, else a new line every few seconds."""

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

IN_PLACE_S = 1.0
LINES_S = 10.0
"""Seconds between two updates of the line on a terminal, and between two lines elsewhere."""
MAX_COLUMNS = 200
"""Width of a line that is updated in place, if that of the terminal is unknown."""


class Progress:
    """Shows the current step, how much of it is done and the elapsed time, also while the step makes no progress.

    Used as a context manager, which starts and stops the writing thread.

    Args:
        stream: Where to write; `None` for no output.
        in_place: Whether to update one line in place; by default if the stream is a terminal.
        interval_s: Seconds between two updates.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        in_place: bool | None = None,
        interval_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._in_place = (stream is not None and stream.isatty()) if in_place is None else in_place
        self._interval_s = interval_s or (IN_PLACE_S if self._in_place else LINES_S)
        self._clock = clock
        self._begun = clock()
        self._what = ""
        self._unit = ""
        self._done = self._total = 0
        self._share = 0.0
        self._reached = self._begun
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Self:
        if self._stream is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._in_place:
            self._write("")

    def begin(self, what: str) -> None:
        """Starts a step, restarts the clock, and writes a line at once."""
        self._begun, self._share = self._clock(), 0.0
        self.part(what)
        self._write(self.line())

    def say(self, line: str) -> None:
        """Writes a permanent line above the line that is updated in place."""
        self._write(line, stays=True)

    def end(self) -> None:
        """Ends the step and clears the line that is updated in place."""
        self._what = ""
        if self._in_place:
            self._write("")

    def part(self, what: str, total: int = 0, unit: str = "") -> None:
        """Starts another part of the step.

        Args:
            what: Description, shown at the start of the line.
            total: Units of work in this part; 0 if unknown.
            unit: Name of the units.
        """
        self._what, self._done, self._total, self._unit = what, 0, total, unit

    def advance(self, amount: int) -> None:
        """Adds finished units to the current part."""
        self._done += amount

    def reached(self, share: float) -> None:
        """Notes which share of the step is done, to estimate the remaining time.

        Only for steps whose remaining work is like the finished work: their parts may differ too much to tell.
        """
        self._share = share
        self._reached = self._clock()

    def line(self) -> str:
        """The line that shows the current state."""
        now = self._clock()
        words = [self._what]
        if self._total:
            words.append(f"{self._done:,} of {self._total:,} {self._unit}")
        words.append(duration(now - self._begun))
        if 0 < self._share < 1:
            left = (self._reached - self._begun) * (1 / self._share - 1) - (now - self._reached)
            words.append(f"about {duration(max(left, 0))} left")
        return ", ".join(words)

    def _repeat(self) -> None:
        while not self._over.wait(self._interval_s):
            if self._what:
                self._write(self.line())

    def _write(self, line: str, stays: bool = False) -> None:
        if self._stream is None:
            return
        with self._lock:
            if self._in_place:
                # Return to the start of the line and clear it. A line as long as the terminal is wide would wrap.
                self._stream.write("\r\x1b[K" + (f"{line}\n" if stays else line[: _columns(self._stream) - 1]))
            else:
                self._stream.write(f"{line}\n")
            self._stream.flush()


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or MAX_COLUMNS
    except (OSError, ValueError):
        return MAX_COLUMNS


def duration(seconds: float) -> str:
    """A time as minutes and seconds, such as `2 min 5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
