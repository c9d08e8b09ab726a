"""SIGINT and SIGTERM end the server at once while it starts; vLLM alone would continue its start."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

VLLM_HANDLER = "_interrupt_init"
"""Name of vLLM's handler of SIGTERM during its start.

It raises `KeyboardInterrupt`, which vLLM's `zmq_socket_ctx` swallows while vLLM waits for its engine. vLLM installs it
over the handler of this module and calls no code of vllm-l2kv until the engine is ready, so a timer restores that one.
"""
CHECK_SECONDS = 0.5


class Stopped(SystemExit):
    """A signal came before the server was ready.

    Attributes:
        code: The exit status, 128 plus the signal's number, as in a shell.
        name: Name of the signal.
    """

    code: int

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def signals_that_stop() -> Iterator[None]:
    """Raises `Stopped` in the main thread at a signal, until vLLM's HTTP server installs its own handlers."""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _restore_handler)
    signal.setitimer(signal.ITIMER_REAL, CHECK_SECONDS, CHECK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: object) -> NoReturn:
    raise Stopped(number)


def _restore_handler(*_: object) -> None:
    """Replaces vLLM's handler of SIGTERM, once; a signal handler too, since only the main thread may set handlers."""
    if (handler := signal.getsignal(signal.SIGTERM)) is _stop:
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    if getattr(handler, "__name__", None) == VLLM_HANDLER:
        signal.signal(signal.SIGTERM, _stop)
