"""Downloads the Python files of the newest supported vLLM, unless an earlier run did, and prints their folder.

vLLM's build for CPUs, which the set-up has, comes later than its build for CUDA. `make test-next` puts the Python files
of the CUDA build first in the path, sets `VLLM_TARGET_DEVICE=cpu`, and runs the tests that need no compiled code. pip
downloads the wheel, 340 MB, and checks its hash; the files are kept in the user's cache.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

from vllm_l2kv.tools.user_cache import default_cache, make_once, say

VERSION = "0.33.0"
SHA256 = "4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa"
TARGET = ("--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--implementation=cp", "--abi=abi3")
KEPT = {".jinja", ".json", ".py"}


class NextVLLMError(RuntimeError):
    """The wheel could not be downloaded; pip printed the reason, and the message has the remedy."""


def ensure_next_vllm(cache: Path | None = None) -> Path:
    """Returns a folder with the package `vllm` and its metadata, which it downloads if missing.

    Safe to interrupt and to run twice at once.

    Args:
        cache: Where to keep them, by default `default_cache()`.

    Raises:
        NextVLLMError: They are missing and cannot be downloaded.
    """
    folder = (cache or default_cache()) / f"vllm-{VERSION}-python-files"
    make_once(folder, lambda scratch: _unpack(_download(scratch), scratch / "unpacked"))
    return folder


def _download(scratch: Path) -> Path:
    say(f"Downloading the wheel of vLLM {VERSION} for CUDA, 340 MB, for its Python files ...")
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"vllm=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *TARGET]
    # pip's output goes to standard error: standard output is for the folder.
    done = subprocess.run([*command, "--dest", str(scratch), "--requirement", str(requirements)], stdout=sys.stderr)
    if done.returncode != 0:
        raise NextVLLMError(
            f"pip could not fetch vllm=={VERSION} for CUDA, see above; name an index that has its wheel, or run again."
        )
    (wheel,) = scratch.glob("*.whl")
    return wheel


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder, [name for name in names if Path(name).suffix in KEPT or ".dist-info/" in name])
    return folder


if __name__ == "__main__":
    try:
        print(ensure_next_vllm())
    except NextVLLMError as error:
        sys.exit(f"next_vllm: {error}")
