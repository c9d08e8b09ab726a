"""Servers of the demo model on this machine, for the time of a measurement."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from vllm_l2kv.tools.demo_model import ensure_demo_model

OURS, STOCK = ["vllm_l2kv.cli", "serve"], ["vllm.entrypoints.openai.api_server", "--model"]
START_SECONDS = 600


@contextmanager
def serving(module: Sequence[str], options: str, log: Path) -> Iterator[str]:
    """Runs a server of the demo model on a free port; yields its URL once it answers."""
    command = [sys.executable, "-m", *module, str(ensure_demo_model()), *options.split()]
    with answering(command, log) as url:
        yield url


@contextmanager
def answering(command: Sequence[str], log: Path) -> Iterator[str]:
    """Runs a program that takes `--port`; yields its URL once it answers `/health`."""
    port = str(free_port())
    # On a CPU this variable would override the option that sets the size of the cache.
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    with log.open("w") as out:
        process = psutil.Popen([*command, "--port", port], stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        family = [process, *process.children(recursive=True)]
        process.terminate()
        for left in psutil.wait_procs(family, timeout=30)[1]:
            left.kill()


def free_port() -> int:
    """Returns a port on which no process listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(url: str, process: psutil.Popen) -> None:
    """Waits until the server answers.

    Raises:
        SystemExit: It has ended, or has not answered in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=10).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    sys.exit("A server did not start; its log in the folder of results says why.")


def machine() -> str:
    """Returns number and name of the processors, as Linux names them."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0].partition(':')[2].strip()}"
