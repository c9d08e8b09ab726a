"""How a server ended, and the last line of one that could not start or lost its engine: a sentence after all logs."""

import atexit
import os
import sys
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import NoReturn

WAIT_SECONDS = 5.0
"""Time for the child processes to end; vLLM has sent them a signal before."""


@dataclass
class Outcome:
    """How the server ended.

    `serve` makes one and adds it to the parsed options as `outcome`. vLLM passes the options to `init_state` of
    endpoint plugins, so the app can report here what `serve` reads after vLLM has returned. Several API servers run in
    processes of their own and report to copies; there vLLM itself raises an error if an engine ends.

    Attributes:
        engine_lost: Whether the engine ended by itself.
    """

    engine_lost: bool = False


class LastLine:
    """Ends the process with a sentence that is the last output, after vLLM's logs, tracebacks and child processes.

    Make it before vLLM is imported: `atexit` runs last what was registered first, after vLLM and `multiprocessing` have
    stopped what they started.
    """

    def __init__(self) -> None:
        self._line: str | None = None
        self._status = 0
        atexit.register(self._write)

    def end(self, status: int, sentence: str) -> NoReturn:
        """Ends the process.

        Args:
            status: Its exit status.
            sentence: What happened, and what to do or where to look.

        Raises:
            SystemExit: Always.
        """
        self._line, self._status = f"vllm-l2kv: {sentence}\n", status
        sys.exit(status)

    def _write(self) -> None:
        if self._line is None:
            return
        _wait_for_children()
        sys.stderr.write(self._line)
        sys.stdout.flush()
        sys.stderr.flush()
        # Destructors of C++ libraries would run now, and some of them write to standard error.
        os._exit(self._status)


def _wait_for_children() -> None:
    """Waits until the child processes have ended and written their last lines, at most `WAIT_SECONDS`."""
    try:
        import psutil  # type: ignore[import-untyped]
    except ModuleNotFoundError:  # it comes with vLLM, so there are none
        return
    if children := psutil.Process().children(recursive=True):
        # The resource tracker is one of them: it reports leaked shared memory, and ends once its pipe is closed.
        if (pipe := resource_tracker.getfd()) is not None:
            os.close(pipe)
        psutil.wait_procs(children, timeout=WAIT_SECONDS)
