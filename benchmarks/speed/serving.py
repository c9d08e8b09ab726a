"""Engine benchmarks of vLLM with and without vllm-l2kv, each engine in a process of its own.

Each engine is started twice: `ample_memory` has the engine core in its own process, as users run it; the other
scenarios need access to it.

python -m benchmarks.speed.serving --model FOLDER --out FOLDER [--engines stock l2kv] [--scenarios ...]

The model needs a `config.json`; weights are random. Appends to one file per scenario in the folder.
"""

import argparse
import importlib
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

from benchmarks.speed.engines import start
from benchmarks.speed.rows import append

DOCUMENTS = ["document", "findable", "popular", "conversation"]
IN_PROCESS = ["decode_step", "first_token", "memory_bound", "long_answers", "bursts", *DOCUMENTS]
SCENARIOS = [*IN_PROCESS, "ample_memory"]
ON_DEMAND = ["offload"]
"""Scenarios that need engine arguments of their own, so they run only if named."""


def main() -> None:
    """Starts the engines' processes, or runs as one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engines", nargs="+", choices=["stock", "l2kv"], default=["stock", "l2kv"])
    parser.add_argument("--scenarios", nargs="+", choices=[*SCENARIOS, *ON_DEMAND], default=SCENARIOS)
    parser.add_argument("--only", nargs="+", default=[], help="cases, ratios or lengths, by their names in the rows")
    parser.add_argument(
        "--full-layers", nargs="*", type=int, default=[0, 1], help="layers that vllm-l2kv never compacts"
    )
    parser.add_argument("--prompt-interval", type=int, default=2048, help="prompt interval of vllm-l2kv")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="vLLM's engine arguments, a JSON object")
    parser.add_argument("--inside", choices=["stock", "l2kv"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is None:
        for engine, scenarios in product(args.engines, ([*IN_PROCESS, *ON_DEMAND], ["ample_memory"])):
            chosen = [scenario for scenario in scenarios if scenario in args.scenarios]
            if chosen:
                only = ["--scenarios", *chosen, "--inside", engine]
                command = [sys.executable, "-m", "benchmarks.speed.serving", *sys.argv[1:], *only]
                subprocess.run(command, check=True)
        return
    in_process = args.scenarios[0] != "ample_memory"
    arguments = {"max_model_len": 131072, **args.engine_args}
    ours = {"full_layers": tuple(args.full_layers), "prompt_interval": args.prompt_interval}
    llm, about = start(args.inside, args.model, in_process, ours, **arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for scenario in args.scenarios:
        for row in importlib.import_module(f"benchmarks.speed.{scenario}").rows(llm, about, args.only):
            append(args.out / f"{scenario}.jsonl", {**about, **row})


if __name__ == "__main__":
    main()
