"""A cache too small for its requests: how many run at once, and how fast, with and without vllm-l2kv.

PYTHONPATH=. python benchmarks/speed/memory_bound.py --model FOLDER --out memory_bound.jsonl [--engines stock l2kv]

16 GiB of KV cache, 48 prompts of 8,000 tokens at once, 400 generated tokens each.
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

NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 48, 8000, 400
RATIOS = {"stock": (None,), "l2kv": (None, 0.5, 0.25, 0.1)}


def main() -> None:
    """Starts one process an engine, or is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engines", nargs="+", choices=["stock", "l2kv"], default=["stock", "l2kv"])
    parser.add_argument("--inside", choices=["stock", "l2kv"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is None:
        for engine in args.engines:
            words = ["--model", args.model, "--out", str(args.out), "--inside", engine]
            subprocess.run([sys.executable, __file__, *words], check=True)
        return
    llm, about = start(args.inside, args.model, kv_cache_memory_bytes=16 << 30)
    for seed, ratio in enumerate(RATIOS[args.inside]):
        row = {**about, "keep_ratio": ratio or 1.0, **run(llm, ratio, seed)}
        with args.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


def run(llm: Any, ratio: float | None, seed: int) -> dict[str, Any]:
    """All requests at once, until the last is done."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    add_requests(llm, NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, ratio, seed)
    begin = time.perf_counter()
    first_token: dict[str, float] = {}
    num_running, preempted = [], {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            first_token.setdefault(output.request_id, time.perf_counter() - begin)
        if scheduler.waiting:
            num_running.append(len(scheduler.running))
        preempted.update({r.request_id: r.num_preemptions for r in scheduler.running if r.num_preemptions})
        preempted.update({r.request_id: r.num_preemptions for r in scheduler.waiting if r.num_preemptions})
    seconds = time.perf_counter() - begin
    return {
        "peak_running": max(num_running, default=NUM_REQUESTS),
        "median_running_while_others_wait": statistics.median(num_running or [NUM_REQUESTS]),
        "output_tokens_per_s": round(NUM_REQUESTS * NUM_OUTPUT_TOKENS / seconds, 1),
        "median_first_token_s": round(statistics.median(first_token.values()), 2),
        "preemptions": sum(preempted.values()),
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    main()
