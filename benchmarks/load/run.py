"""The load of docs/load_testing.md: vllm-l2kv and stock vLLM beside each other on this machine, with the demo model.

python benchmarks/load/run.py OUT [words of `vllm-l2kv bench`]

Starts both servers with the same small cache, runs `vllm-l2kv bench --compare`, and ends them. Rows, plots and the
page go into the folder OUT, and the servers' logs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
from vllm_l2kv_server.demo_model import ensure_demo_model

CACHE_BYTES = 96 * 2**20
"""Room for about 2,000 tokens, so that requests must wait for memory."""
ENGINE = f"--served-model-name demo --dtype float32 --enforce-eager --max-model-len 1024 --block-size 32 \
--kv-cache-memory-bytes {CACHE_BYTES}"
LOAD = "--ratios 1,0.5,0.25 --requests 24 --concurrency 12 --prompt-tokens 300:700 --output-tokens 64 --warmup 1"
OURS, STOCK = ["vllm_l2kv_server.cli", "serve"], ["vllm.entrypoints.openai.api_server", "--model"]
START_SECONDS = 600


def main() -> None:
    """Starts the servers, runs the test, and notes the machine in its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ports", type=int, nargs=2, default=[8011, 8012], help="of vllm-l2kv and stock vLLM")
    args, words = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = str(ensure_demo_model())
    urls = [f"http://127.0.0.1:{port}" for port in args.ports]
    with ExitStack() as stack:
        for module, name, port in zip((OURS, STOCK), ("ours", "stock"), args.ports, strict=True):
            command = [sys.executable, "-m", *module, model, *ENGINE.split(), "--port", str(port)]
            stack.enter_context(serving(command, args.out / f"{name}.log"))
        for url in urls:
            wait_for(url)
        bench = [sys.executable, "-m", "vllm_l2kv_server.cli", "bench", "--url", urls[0], "--compare", urls[1]]
        status = subprocess.run([*bench, *LOAD.split(), "--out", str(args.out), *words], check=False).returncode
    rows = args.out / "rows.jsonl"
    found = [json.loads(line) | {"machine": machine()} for line in rows.read_text().splitlines()]
    rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    sys.exit(status)


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[None]:
    """A server's process, ended with all that it started."""
    with log.open("w") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        yield
    finally:
        family = [process, *process.children(recursive=True)]
        process.terminate()
        for left in psutil.wait_procs(family, timeout=30)[1]:
            left.kill()


def wait_for(url: str) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=10).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            sys.exit(f"{url} did not start in {START_SECONDS} s; its log says why.")
        time.sleep(1)


def machine() -> str:
    """Processors, as Linux names them."""
    (name, *_) = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} x {name.partition(':')[2].strip()}"


if __name__ == "__main__":
    main()
