"""Folders in the user's cache, each of which is made once."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from vllm_l2kv.log import MARK


def default_cache() -> Path:
    """The folder of vllm-l2kv in the user's cache: below `XDG_CACHE_HOME`, or `~/.cache` if that is not set."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm-l2kv"


def make_once(folder: Path, gather: Callable[[Path], Path]) -> None:
    """Makes a folder atomically if it does not exist.

    It may be interrupted, and several processes may run it at once: the second one uses the folder of the first.

    Args:
        folder: The folder to make.
        gather: Takes an empty scratch folder next to `folder`, and returns the folder in it that is renamed to
            `folder`.

    Raises:
        OSError: The folder cannot be written.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=folder.parent) as scratch:
        gathered = gather(Path(scratch))
        try:
            gathered.rename(folder)
        except OSError:
            # Replacing a folder that has files fails: another process has made it first.
            if not folder.is_dir():
                raise


def say(message: str) -> None:
    """Writes a line to standard error; standard output is left to the caller."""
    sys.stderr.write(f"{MARK} {message}\n")
    sys.stderr.flush()
