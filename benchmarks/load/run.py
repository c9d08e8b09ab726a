"""The load of docs/load_testing.md: vllm-l2kv and stock vLLM beside each other on this machine, with the demo model.

python -m benchmarks.load.run OUT [words of `vllm-l2kv bench`]

Starts both servers with the same small cache, runs `vllm-l2kv bench --compare`, and ends them. Rows, plots and the
page go into the folder OUT, and so do the servers' logs.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from vllm_l2kv.tools.demo_model import ensure_demo_model

CACHE_MIB = 96
"""Room for about 2,000 tokens, so that requests must wait for memory."""
ENGINE = f"--served-model-name demo --dtype float32 --enforce-eager --max-model-len 1024 --block-size 32 \
--kv-cache-memory-bytes {CACHE_MIB * 2**20}"
LOAD = "--ratios 1,0.5,0.25,0.25,0.5,1 --requests 16 --concurrency 12 --prompt-tokens 300:700 --output-tokens 64"
OURS, STOCK = ["vllm_l2kv.cli", "serve"], ["vllm.entrypoints.openai.api_server", "--model"]
START_SECONDS = 600


def main() -> None:
    """Starts the servers, runs the test, and notes the machine in its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    args, words = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end too
    args.out.mkdir(parents=True, exist_ok=True)
    with serving(OURS, args.out / "ours.log") as ours, serving(STOCK, args.out / "stock.log") as stock:
        bench = [sys.executable, "-m", "vllm_l2kv.cli", "bench", "--url", ours, "--compare", stock]
        status = subprocess.run([*bench, *LOAD.split(), "--out", str(args.out), *words], check=False).returncode
    rows = args.out / "rows.jsonl"
    if not rows.exists():
        sys.exit(status)
    found = [json.loads(line) | {"machine": machine(), "options": ENGINE} for line in rows.read_text().splitlines()]
    rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    sys.exit(status)


@contextmanager
def serving(module: list[str], log: Path) -> Iterator[str]:
    """A server of the demo model on a free port; its URL, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", *module, str(ensure_demo_model()), *ENGINE.split(), "--port", port]
    # On a CPU this variable would win over the option.
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    with log.open("w") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        family = [process, *process.children(recursive=True)]
        process.terminate()
        for left in psutil.wait_procs(family, timeout=30)[1]:
            left.kill()


def wait_for(url: str, process: psutil.Popen) -> None:
    """Until the server answers, or has ended."""
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
    """Processors, as Linux names them."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0].partition(':')[2].strip()}"


if __name__ == "__main__":
    main()
