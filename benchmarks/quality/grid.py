"""Measures the settings that docs/quality.md compares, with one engine for each set of full layers and heads.

python -m benchmarks.quality.grid MODEL OUT --profile FILE --commit C [--at-once 3 --cache-gib 16]

Prompts are made first and kept in OUT, since making them needs packages that a machine with a GPU may lack (with
--prompts-only nothing else is done). Rows are added to files below OUT/rows as they are measured. Run the same command
again to continue after an interruption.
"""

import argparse
import json
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.quality.settings import (
    COPY_LENGTH,
    LENGTHS,
    MAIN_LENGTH,
    MEMORIES,
    METHODS,
    NUM_SAMPLES,
    OPTIONS,
    SEED,
    Full,
    Setting,
    settings,
)
from vllm_l2kv.cli_types import heads
from vllm_l2kv.profile import Profile
from vllm_l2kv.tools.evaluation.cases import Case
from vllm_l2kv.tools.evaluation.cli import cases_of, write_rows
from vllm_l2kv.tools.evaluation.rows import prepare_for_more
from vllm_l2kv.tools.evaluation.tasks import chat, needle, passkey
from vllm_l2kv.tools.evaluation.variants import QUESTIONS, SEEN

PROMPTS, SETTINGS, ROWS = "prompts.pickle", "settings.jsonl", "rows"
ANSWER_TOKENS = {
    "needle": needle.NUM_ANSWER_TOKENS,
    "passkey": passkey.NUM_ANSWER_TOKENS,
    "chat": chat.NUM_ANSWER_TOKENS,
    "perplexity": OPTIONS["perplexity"]["continued"] + 1,
}
"""Tokens of answers, for tasks whose length is that of the prompt alone."""
QUESTIONS_OF = {"perplexity": (SEEN,), "copy": (SEEN,)}
"""Tasks with the question seen only: a text has no question, and the request to copy a list is short."""
MAX_REQUESTS = 512
"""Number of requests in one batch."""
Unit = tuple[int, str]
"""Unit of work: a length and a task."""


def main() -> None:
    """Makes prompts, then starts a process for each set of full layers and heads; or runs as one of them."""
    parser = _parser()
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = _prompts(args)
    if args.prompts_only:
        return
    if args.profile is None:
        parser.error("argument --profile: required, since full layers, full heads and weights come from it")
    compared = settings(Profile.read(args.profile), args.methods, args.memory)
    sets = list(dict.fromkeys(setting.full for setting in compared))
    if args.engine is not None:
        measure(args, prompts, [setting for setting in compared if setting.full == sets[args.engine]])
        return
    rows = [json.dumps(setting.as_row()) + "\n" for setting in compared]
    (args.out / SETTINGS).write_text("".join(rows), encoding="utf-8")
    with ThreadPoolExecutor(args.at_once) as pool:
        statuses = list(pool.map(_run_engine, [args.out] * len(sets), range(len(sets)), sets))
    sys.exit(max(statuses))


def measure(args: argparse.Namespace, prompts: dict[Unit, list[Case]], compared: Sequence[Setting]) -> None:
    """Measures the missing rows, with one engine."""
    full = compared[0].full
    (args.out / ROWS).mkdir(exist_ok=True)
    path = args.out / ROWS / f"{_name(full)}.jsonl"
    found = Counter(_prompt(row["task"], row) for row in (prepare_for_more(path) if path.exists() else []))
    engine, variants = None, list(dict.fromkeys(each.params for each in compared))
    for (length, task), cases in prompts.items():
        questions = QUESTIONS_OF.get(task, QUESTIONS)
        num_rows = sum(len(questions) if variant.compresses else 1 for variant in variants)
        missing = [case for case in cases if found[_prompt(task, case.about)] < num_rows]
        if not missing:
            continue
        engine = engine or _engine(args, full, max(length for length, _ in prompts))
        begun = time.monotonic()
        options = _options(task, length, args.seed, questions=questions)
        write_rows(engine, options, missing, variants, path)
        seconds = time.monotonic() - begun
        _say(f"{_name(full)}: {length} {task}, {len(missing)} prompts x {num_rows}, {seconds:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", type=Path, help="profile of the model, from `vllm-l2kv profile`")
    parser.add_argument("--commit", default="", help="commit that is measured, written into rows")
    parser.add_argument("--prompts-only", action="store_true")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="engines that run side by side")
    parser.add_argument("--cache-gib", type=int, metavar="N", help="KV cache of each engine, on a GPU")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--memory", nargs="+", type=float, default=MEMORIES)
    parser.add_argument("--only", nargs="+", metavar="LENGTH/TASK", help="only these, such as 2048/needle")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N", help="seed of new prompts")
    parser.add_argument("--few", action="store_true", help="one sample for each depth or subtask, to try it out")
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    return parser


def _units(args: argparse.Namespace) -> Iterable[tuple[Unit, int]]:
    """Yields lengths and tasks, and the number of samples of each."""
    if args.only:
        asked = [word.split("/") for word in args.only]
        units = [(int(length), task) for length, task in asked]
    else:
        tasks = [task for task in OPTIONS if task != "copy"]
        units = [(MAIN_LENGTH, task) for task in tasks] + [(COPY_LENGTH, "copy")]
        units += [(length, task) for length in LENGTHS if length != MAIN_LENGTH for task in tasks]
    for length, task in units:
        at_main, elsewhere = NUM_SAMPLES[task]
        yield (length, task), 1 if args.few else at_main if length in (MAIN_LENGTH, COPY_LENGTH) else elsewhere


def _prompts(args: argparse.Namespace) -> dict[Unit, list[Case]]:
    """Returns the prompts kept in the folder, or makes new ones."""
    path = args.out / PROMPTS
    if path.exists():
        kept: dict[Unit, list[Case]] = pickle.loads(path.read_bytes())
        return {unit: kept[unit] for unit, _ in _units(args)}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    made = {}
    for (length, task), num_samples in _units(args):
        options = _options(task, length - ANSWER_TOKENS.get(task, 0), args.seed, samples=num_samples)
        # In rows of all tasks the length includes the answer.
        made[length, task] = [
            replace(case, about={**case.about, "length": length}) for case in cases_of(options, tokenizer)
        ]
    path.write_bytes(pickle.dumps(made))
    return made


def _options(task: str, length: int, seed: int, **more: Any) -> argparse.Namespace:
    """Returns options as the command line of `vllm-l2kv eval` gives them."""
    return argparse.Namespace(task=task, lengths=[length], seed=seed, **OPTIONS[task], **more)


def _engine(args: argparse.Namespace, full: Full, max_model_len: int) -> Any:
    from vllm_l2kv.tools.evaluation.run import Engine

    device: dict[str, Any] = {}
    if args.cache_gib:
        # CUDA graphs take longer to capture than they save here. vLLM requires this share of the memory to be free at
        # the start, although the size in bytes decides.
        device = {
            "enforce_eager": True,
            "max_num_seqs": MAX_REQUESTS,
            "kv_cache_memory_bytes": args.cache_gib * 2**30,
            "gpu_memory_utilization": 0.1,
        }
    layers, words = full
    engine = Engine(
        args.model, layers, profile=args.profile, full_heads=heads(words), max_model_len=max_model_len, **device
    )
    engine.about["commit"] = args.commit
    return engine


def _run_engine(out: Path, index: int, full: Full) -> int:
    """Runs a process that measures one set of full layers and heads, with a log; returns its exit status."""
    log = out / f"{_name(full)}.log"
    begun = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.quality.grid", *sys.argv[1:], "--engine", str(index)]
    with log.open("a", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    _say(f"{_name(full)}: status {status} after {time.monotonic() - begun:.0f} s, see {log}")
    return status


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _name(full: Full) -> str:
    """Returns a name for files, without heads, which are too many."""
    layers, words = full
    name = f"full-{'-'.join(map(str, layers)) or 'none'}"
    return f"{name}-heads-{sha256(words.encode()).hexdigest()[:8]}" if words else name


def _prompt(task: str, about: Any) -> tuple[Any, ...]:
    """Returns a key that identifies a prompt of one model."""
    return task, *(about.get(name) for name in ("length", "subtask", "depth", "sample", "turn"))


if __name__ == "__main__":
    main()
