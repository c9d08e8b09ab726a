"""How far a long command is: one line that changes in place on a terminal, elsewhere a line every few seconds."""

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

IN_PLACE_S = 1.0
LINES_S = 10.0
"""Seconds between two states of the line on a terminal, and between two lines elsewhere."""
MAX_COLUMNS = 200
"""Of a line that changes, where the width is unknown."""


class Progress:
    """Says what is being done, how much of it is done and for how long; also while nothing gets done.

    Used as a context manager, which starts and ends the thread that writes.

    Args:
        stream: Where the lines go; `None` for a silent one.
        in_place: Whether one line changes, by default if the stream is a terminal.
        interval_s: Seconds between two lines.
        clock: Seconds.
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
        """Starts a step, and the clock with it, and says so at once."""
        self._begun, self._share = self._clock(), 0.0
        self.part(what)
        self._write(self.line())

    def say(self, line: str) -> None:
        """Writes a line that stays, above the one that changes."""
        self._write(line, stays=True)

    def end(self) -> None:
        """Ends the step; the line that changes goes."""
        self._what = ""
        if self._in_place:
            self._write("")

    def part(self, what: str, total: int = 0, unit: str = "") -> None:
        """Goes on to another part of the step.

        Args:
            what: What is being done, as the line begins.
            total: Units of work in this part; 0 if that is unknown.
            unit: Their name.
        """
        self._what, self._done, self._total, self._unit = what, 0, total, unit

    def advance(self, amount: int) -> None:
        """Counts units of the part that are done."""
        self._done += amount

    def reached(self, share: float) -> None:
        """Notes that this share of the step is done, by which the remaining time is estimated.

        Called where what is left is like what is done: parts differ too much.
        """
        self._share = share
        self._reached = self._clock()

    def line(self) -> str:
        """The state as it is shown."""
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
                # Back to the beginning of the line, which is then cleared to its end. A longer one would wrap.
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
    """Minutes and seconds, as lines show them."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
