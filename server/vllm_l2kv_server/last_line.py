"""How a server ended, and its last line: a sentence after all logs."""

import atexit
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import NoReturn

from vllm_l2kv_server.screen import Screen

WAIT_SECONDS = 5.0
"""Time for the child processes to end; vLLM has sent them a signal by then."""


@dataclass
class Outcome:
    """How the server ended.

    `serve` adds one to the parsed options as `outcome`. vLLM passes the options to `init_state` of endpoint plugins, so
    the app can set what `serve` reads after vLLM has returned. With several API servers, each is a process with a copy
    that `serve` does not read; there vLLM itself raises an error if an engine ends.

    Attributes:
        engine_lost: Whether the engine ended by itself.
    """

    engine_lost: bool = False


class LastLine:
    """Ends the process with a sentence that is the last output, after vLLM's logs, tracebacks and child processes.

    Make it before vLLM is imported: `atexit` runs last what was registered first, so this runs after vLLM and
    `multiprocessing` have stopped what they started.

    Args:
        screen: Where it is printed.
    """

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._line: str | None = None
        self._status = 0
        start_silent_resource_tracker()
        atexit.register(self._write)

    def end(self, status: int, sentence: str) -> NoReturn:
        """Ends the process; further signals are ignored, since it ends within seconds.

        Args:
            status: Its exit status.
            sentence: What happened, and what to do or where to look.

        Raises:
            SystemExit: Always.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        self._line, self._status = f"vllm-l2kv: {sentence}\n", status
        sys.exit(status)

    def _write(self) -> None:
        if self._line is None:
            return
        _wait_for_children()
        self._screen.close(self._line, failed=self._status == 1)
        sys.stdout.flush()
        sys.stderr.flush()
        # Destructors of C++ libraries would run now, and some of them write to standard error.
        os._exit(self._status)


def start_silent_resource_tracker() -> None:
    """Starts Python's resource tracker, which all processes share, and discards its standard error.

    vLLM kills its processes at the end. The tracker frees the semaphores and the shared memory that they leave, and
    would print a warning of a leak after the last line.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            resource_tracker.ensure_running()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _wait_for_children() -> None:
    """Waits until the child processes have ended and written their last lines, at most `WAIT_SECONDS`."""
    try:
        import psutil  # type: ignore[import-untyped]
    except ModuleNotFoundError:  # without vLLM there is no psutil, and no child process
        return
    if children := psutil.Process().children(recursive=True):
        # The resource tracker is one of them; it ends once its pipe is closed.
        if (pipe := resource_tracker.getfd()) is not None:
            os.close(pipe)
        psutil.wait_procs(children, timeout=WAIT_SECONDS)
