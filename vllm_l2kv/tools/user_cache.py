"""Folders in the user's cache, each made once."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from vllm_l2kv.log import MARK


def default_cache() -> Path:
    """Our folder in the user's cache: below `XDG_CACHE_HOME`, or `~/.cache` without it."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm-l2kv"


def make_once(folder: Path, gather: Callable[[Path], Path]) -> None:
    """Makes a folder, if it is not there, appear whole in one step.

    Safe to interrupt and to run twice at once: the second run uses the folder of the first.

    Args:
        folder: In the cache.
        gather: Is given an empty scratch folder beside it, and returns the folder within that is to have its name.

    Raises:
        OSError: It cannot be written.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=folder.parent) as scratch:
        gathered = gather(Path(scratch))
        try:
            gathered.rename(folder)
        except OSError:
            # A folder with files in it cannot be replaced: another run was first.
            if not folder.is_dir():
                raise


def say(message: str) -> None:
    """Writes a line to standard error; standard output belongs to the caller."""
    sys.stderr.write(f"{MARK} {message}\n")
    sys.stderr.flush()
