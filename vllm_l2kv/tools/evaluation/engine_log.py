"""What an engine prints, vLLM's log above all, goes to a file, so that the terminal has room for what was asked."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from vllm_l2kv.tools.evaluation.progress import Progress
from vllm_l2kv.tools.options import RefusedError

NUM_LAST_LINES = 20


@contextmanager
def progress_beside_log(path: Path, verbose: bool) -> Iterator[Progress]:
    """Progress on standard error; all else that is printed meanwhile goes to a log.

    Args:
        path: The log. If the work fails, its end is printed.
        verbose: Whether it is printed instead.
    """
    if verbose:
        # Among the lines of a log, one that changes in place is lost.
        with Progress(sys.stderr, in_place=False) as progress:
            yield progress
        return
    sys.stderr.write(f"Log: {path} (--verbose prints it here instead)\n")
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
    """Sends descriptors 1 and 2 to a file: what this process, its children and C libraries print.

    Args:
        path: The file, which is begun anew.

    Yields:
        What standard error was before.
    """
    flush_all()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    with path.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        with os.fdopen(saved[1], "w", encoding="utf-8", closefd=False) as terminal:
            yield terminal
    finally:
        flush_all()
        for descriptor, before in zip((1, 2), saved, strict=True):
            os.dup2(before, descriptor)
            os.close(before)


def last_lines(path: Path) -> str:
    """The end of a log, which says why an engine ended."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"The last lines of {path}:", *(f"  {line}" for line in lines[-NUM_LAST_LINES:]), ""])


def flush_all() -> None:
    """Writes what Python still holds of standard output and standard error."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
