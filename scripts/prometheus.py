"""Makes Prometheus and promtool available, and prints the folder that has both.

Uses installed programs, else those of an earlier run in the user's cache, else Debian's package, which apt verifies and
dpkg unpacks into that cache: nothing is installed, and root is not needed. For Debian and its derivatives only.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from vllm_l2kv.tools.user_cache import default_cache, make_once, say

PROGRAMS = ("prometheus", "promtool")


class PrometheusError(RuntimeError):
    """Prometheus could not be made available; the message has the failure and the remedy."""


def ensure_prometheus(cache: Path | None = None) -> Path:
    """Returns a folder with both programs, which it downloads if they are missing.

    Safe to interrupt and to run twice at once.

    Args:
        cache: Where to keep them, by default `default_cache()`.

    Raises:
        PrometheusError: They are not installed and cannot be downloaded.
    """
    installed = {Path(found).parent for program in PROGRAMS if (found := shutil.which(program))}
    if len(installed) == 1 and _is_whole(folder := installed.pop()):
        return folder
    cache = cache or default_cache()
    programs = cache / "prometheus" / "usr" / "bin"
    if not _is_whole(programs):
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            raise PrometheusError("Prometheus is not installed, and only Debian's package can be fetched; install it.")
        make_once(cache / "prometheus", _unpacked)
    if not _is_whole(programs):
        raise PrometheusError(f"{programs} lacks {' or '.join(PROGRAMS)}; delete {cache / 'prometheus'} and run again.")
    return programs


def _unpacked(scratch: Path) -> Path:
    folder = scratch / "unpacked"
    _run("dpkg", "-x", str(_download(scratch)), str(folder))
    return folder


def _download(scratch: Path) -> Path:
    """Downloads the package by the machine's package lists or, if that fails, by new ones."""
    say("Downloading Debian's package of Prometheus ...")
    lists, packages = scratch / "lists", scratch / "packages"
    for folder in (lists / "partial", packages):
        folder.mkdir(parents=True)
    ours = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={scratch / 'cache'}", "-o", "Debug::NoLocking=1"]
    try:
        _run("apt-get", "download", "prometheus", folder=packages)
    except PrometheusError:
        _run("apt-get", *ours, "update")
        _run("apt-get", *ours, "download", "prometheus", folder=packages)
    (package,) = packages.glob("*.deb")
    return package


def _run(*command: str, folder: Path | None = None) -> None:
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise PrometheusError(f"`{' '.join(command)}` failed ({lines[-1]}); install Prometheus, or run again.")


def _is_whole(folder: Path) -> bool:
    return all(os.access(folder / program, os.X_OK) for program in PROGRAMS)


if __name__ == "__main__":
    try:
        print(ensure_prometheus())
    except PrometheusError as error:
        sys.exit(f"prometheus: {error}")
