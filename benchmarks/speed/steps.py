"""Median decode step of a full batch, vLLM with and without vllm-l2kv; each engine in a process of its own.

PYTHONPATH=. python benchmarks/speed/steps.py --model FOLDER --out steps.jsonl [--engines stock l2kv] [--cases ...]

Times only steps in which the whole batch decodes. The model needs a `config.json` and a tokenizer; weights are made up.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engines import add_requests, start

# (requests, prompt tokens, keep ratio or None)
CASES = {
    "1x128": (1, 128, None),
    "64x256": (64, 256, None),
    "32x4000": (32, 4000, None),
    "8x15000": (8, 15000, None),
    "12x15000": (12, 15000, None),
    "8x15000@0.5": (8, 15000, 0.5),
    "8x15000@0.25": (8, 15000, 0.25),
    "8x15000@0.1": (8, 15000, 0.1),
}
NUM_STEPS = 180


def main() -> None:
    """Starts one process an engine, or is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engines", nargs="+", choices=["stock", "l2kv"], default=["stock", "l2kv"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--inside", choices=["stock", "l2kv"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        measure(args.inside, args)
        return
    for engine in args.engines:
        words = ["--model", args.model, "--out", str(args.out), "--inside", engine, "--cases", *args.cases]
        subprocess.run([sys.executable, __file__, *words], check=True)


def measure(engine: str, args: argparse.Namespace) -> None:
    """Runs the cases on one engine and appends a JSON row for each."""
    llm, about = start(engine, args.model, kv_cache_memory_bytes=34 << 30)
    for i, name in enumerate(args.cases):
        num_requests, num_prompt_tokens, ratio = CASES[name]
        if ratio is not None and engine == "stock":
            continue
        steps, prefill = run_case(llm, num_requests, num_prompt_tokens, ratio, seed=i)
        row = {
            **about,
            "case": name,
            "median_step_ms": round(statistics.median(steps), 3),
            "p10_ms": round(statistics.quantiles(steps, n=10)[0], 3),
            "p90_ms": round(statistics.quantiles(steps, n=10)[-1], 3),
            "num_steps": len(steps),
            "prefill_s": round(prefill, 3),
        }
        with args.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        sys.stdout.write(json.dumps({k: v for k, v in row.items() if k != "groups"}) + "\n")
        sys.stdout.flush()


def run_case(
    llm: Any, num_requests: int, num_prompt_tokens: int, ratio: float | None, seed: int
) -> tuple[list[float], float]:
    """Milliseconds of the steps in which every request decodes, and seconds until they all do."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    req_ids = add_requests(llm, num_requests, num_prompt_tokens, NUM_STEPS + num_requests * 4 + 60, ratio, seed)
    begin = time.perf_counter()
    while not (len(scheduler.running) == num_requests and all(r.num_output_tokens > 4 for r in scheduler.running)):
        engine.step()
    prefill = time.perf_counter() - begin
    steps = []
    for _ in range(NUM_STEPS):
        begin = time.perf_counter()
        engine.step()
        steps.append((time.perf_counter() - begin) * 1000)
    assert len(scheduler.running) == num_requests
    engine.abort_request(req_ids)
    while engine.has_unfinished_requests():
        engine.step()
    return steps, prefill


if __name__ == "__main__":
    main()
