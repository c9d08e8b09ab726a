"""Sends the output of an engine, mostly vLLM's log, to a file, so that the terminal shows only the command's own."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from vllm_l2kv.tools.options import RefusedError
from vllm_l2kv.tools.progress import Progress

NUM_LAST_LINES = 20
ERROR = re.compile(r" ERROR [^\]]*\] (.*)")
"""An error line of vLLM's log; group 1 is its text."""
EXCEPTION = re.compile(r"[\w.]+(Error|Exception): ")
"""The last line of a traceback."""


@contextmanager
def progress_beside_log(path: Path, verbose: bool) -> Iterator[Progress]:
    """Shows progress on standard error and sends all other output to a log file.

    Args:
        path: The log file. If the work fails, its last lines are printed.
        verbose: Whether to print the log instead of writing a file.
    """
    if verbose:
        # A line that changes in place would get lost among the lines of the log.
        with Progress(sys.stderr, in_place=False) as progress:
            yield progress
        return
    sys.stderr.write(where_the_log_is(path))
    try:
        with output_to(path) as terminal, Progress(terminal) as progress:
            yield progress
    except RefusedError:
        raise
    except Exception:
        sys.stderr.write(last_lines(path))
        raise


@contextmanager
def output_to(path: Path) -> Iterator[TextIO]:
    """Sends output to a file, as `send_output_to` does, until the end of the block."""
    flush_all()
    output = os.dup(1)
    terminal = send_output_to(path)
    try:
        yield terminal
    finally:
        flush_all()
        terminal.flush()
        for descriptor, before in ((1, output), (2, terminal.fileno())):
            os.dup2(before, descriptor)
        os.close(output)
        terminal.close()


def send_output_to(path: Path) -> TextIO:
    """Redirects descriptors 1 and 2 to a file: output of this process, of C libraries and of later child processes.

    Args:
        path: The file; overwritten.

    Returns:
        The previous standard error.

    Raises:
        OSError: The file cannot be written; nothing is redirected.
    """
    with path.open("wb") as file:
        flush_all()
        terminal = os.fdopen(os.dup(2), "w", encoding="utf-8")
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    return terminal


def where_the_log_is(path: Path) -> str:
    """A line that names the log file, printed before the work begins."""
    return f"Log: {path} (--verbose prints it here instead)\n"


def last_lines(path: Path) -> str:
    """The last lines of a log, which usually say why an engine ended."""
    return _excerpt(f"The last lines of {path}:", _lines(path)[-NUM_LAST_LINES:])


def first_error(path: Path) -> str:
    """The first error in vLLM's log and the first exception; empty if there is none.

    Later errors are consequences in other processes, with tracebacks of dozens of lines.
    """
    errors = [found[1] for line in _lines(path) if (found := ERROR.search(line))]
    exceptions = [text for text in errors if EXCEPTION.match(text)]
    return _excerpt(f"The first error in {path}:", [*errors[:1], *exceptions[:1]]) if errors else ""


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _excerpt(heading: str, lines: list[str]) -> str:
    return "\n".join([heading, *(f"  {line}" for line in lines), ""])


def flush_all() -> None:
    """Flushes Python's buffers of standard output and standard error."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
