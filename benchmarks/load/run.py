"""The load test of docs/load_testing.md: vllm-l2kv and stock vLLM on this machine, with the demo model.

python -m benchmarks.load.run OUT [options of `vllm-l2kv bench`]

Starts both servers with the same small cache, runs `vllm-l2kv bench --compare`, and ends them. Rows, plots, the page
and the servers' logs go into the folder OUT.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.load.servers import OURS, STOCK, machine, serving

CACHE_MIB = 96
"""Room for about 2,000 tokens, so that requests must wait for memory."""
ENGINE = f"--served-model-name demo --dtype float32 --enforce-eager --max-model-len 1024 --block-size 32 \
--kv-cache-memory-bytes {CACHE_MIB * 2**20}"
LOAD = "--ratios 1,0.5,0.25,0.25,0.5,1 --requests 16 --concurrency 12 --prompt-tokens 300:700 --output-tokens 64"


def main() -> None:
    """Starts the servers, runs the test, and adds the machine to its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    args, words = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end too
    args.out.mkdir(parents=True, exist_ok=True)
    with serving(OURS, ENGINE, args.out / "ours.log") as ours, serving(STOCK, ENGINE, args.out / "stock.log") as stock:
        bench = [sys.executable, "-m", "vllm_l2kv.cli", "bench", "--url", ours, "--compare", stock]
        status = subprocess.run([*bench, *LOAD.split(), "--out", str(args.out), *words], check=False).returncode
    rows = args.out / "rows.jsonl"
    if not rows.exists():
        sys.exit(status)
    found = [json.loads(line) | {"machine": machine(), "options": ENGINE} for line in rows.read_text().splitlines()]
    rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    sys.exit(status)


if __name__ == "__main__":
    main()
