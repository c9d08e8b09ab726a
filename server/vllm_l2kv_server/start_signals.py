"""SIGINT and SIGTERM while the server starts: they end it at once, where vLLM would go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

VLLM_HANDLER = "_interrupt_init"
"""Of SIGTERM during vLLM's start. It raises `KeyboardInterrupt`, which vLLM swallows while it waits for its engine."""
LOOK_SECONDS = 0.5


class Stopped(SystemExit):
    """A signal came before the server was ready.

    Attributes:
        code: The exit status, 128 and the signal's number, as of a shell.
        name: Of the signal.
    """

    code: int

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def signals_that_stop() -> Iterator[None]:
    """Raises `Stopped` in the main thread when a signal comes, until vLLM's HTTP server has handlers of its own."""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _take_back)
    signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS, LOOK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: object) -> NoReturn:
    raise Stopped(number)


def _take_back(*_: object) -> None:
    """Puts our handler of SIGTERM in the place of vLLM's, once; a timer's, so it runs in the main thread as it must."""
    if (handler := signal.getsignal(signal.SIGTERM)) is _stop:
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    if getattr(handler, "__name__", None) == VLLM_HANDLER:
        signal.signal(signal.SIGTERM, _stop)
