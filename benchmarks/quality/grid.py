"""The measurements of docs/quality.md, one engine for each set of full layers.

python -m benchmarks.quality.grid MODEL OUT --commit C --full-layers 0,1 none 0 [--lengths 1024 4096]

{0, 1} is measured with every scorer, and l2 by block; other sets with l2 and the controls, at the first length. Appends
to one `rows.jsonl` a task in the folder, so runs side by side need folders of their own.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_l2kv.params import CONTROLS, SCORERS
from vllm_l2kv.tools.evaluation.cli import ESSAYS, NUM_ANSWER_TOKENS, ROWS, cases_of, write_rows
from vllm_l2kv.tools.evaluation.run import Engine
from vllm_l2kv.tools.evaluation.tasks.ruler import TASKS as SUBTASKS
from vllm_l2kv.tools.evaluation.variants import variants

RATIOS = {
    "perplexity": (0.75, 0.5, 0.25),
    "passkey": (0.75, 0.5, 0.25, 0.1),
    "needle": (0.75, 0.5, 0.25),
    "ruler": (0.5, 0.25),
}
MAIN_LAYERS = [0, 1]
PROTECTIONS = ((0, 0), (4, 64))
DEPTHS = (0.1, 0.5, 0.9)
OPTIONS: dict[str, dict[str, Any]] = {
    "perplexity": {"text": "moby_dick", "continued": 64},
    "passkey": {"depths": DEPTHS},
    "needle": {"text": ESSAYS, "depths": DEPTHS},
    "ruler": {"text": ESSAYS, "subtasks": list(SUBTASKS)},
}
SEED = 0


def main() -> None:
    """Starts a process for each set of full layers, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", required=True, help="what is measured, as rows name it")
    parser.add_argument("--full-layers", nargs="+", default=["0,1"], metavar="I,J", help="sets; none is the empty one")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--samples", type=int, default=10, help="of each length, and depth or subtask")
    parser.add_argument("--tasks", nargs="+", choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--cache-gib", type=int, help="KV cache of a run that shares its GPU with others")
    args = parser.parse_args()
    if len(args.full_layers) > 1:
        for layers in args.full_layers:
            command = [sys.executable, "-m", "benchmarks.quality.grid", *sys.argv[1:], "--full-layers", layers]
            subprocess.run(command, check=True)
        return
    full_layers = [int(layer) for layer in args.full_layers[0].split(",") if layer != "none"]
    shared: dict[str, Any] = {}
    if args.cache_gib:
        # vLLM wants its share of the memory to be free at the start, although the other number decides.
        shared = {"kv_cache_memory_bytes": args.cache_gib * 2**30, "gpu_memory_utilization": 0.1}
    engine = Engine(args.model, full_layers, max_model_len=max(args.lengths) + NUM_ANSWER_TOKENS, **shared)
    engine.about["commit"] = args.commit
    main_layers = full_layers == MAIN_LAYERS
    lengths = args.lengths if main_layers else args.lengths[:1]
    for task in args.tasks:
        scorers = [scorer for scorer in SCORERS if scorer not in CONTROLS] if main_layers else ["l2"]
        compared = variants(scorers, RATIOS[task], PROTECTIONS)
        if main_layers:
            compared += variants(["l2"], RATIOS[task], PROTECTIONS, ["block"])
        run(engine, task, lengths, args.samples, list(dict.fromkeys(compared)), args.out)


def run(engine: Engine, task: str, lengths: list[int], num_samples: int, compared: list[Any], out: Path) -> None:
    """Measures one task."""
    # RULER's eleven subtasks count as depths do elsewhere.
    num_samples = max(1, num_samples // 2) if task == "ruler" else num_samples
    options = argparse.Namespace(task=task, lengths=lengths, samples=num_samples, seed=SEED, **OPTIONS[task])
    (out / task).mkdir(parents=True, exist_ok=True)
    write_rows(engine, options, list(cases_of(options, engine.tokenizer)), compared, out / task / ROWS)


if __name__ == "__main__":
    main()
