"""Decoding with and without drafts: tokens per second, drafts accepted, and blocks held, at several ratios.

python -m benchmarks.speed.drafts --model MODEL --text FILE --out drafts.jsonl [--variants ...]
python -m benchmarks.speed.shapes 8b FOLDER
python -m benchmarks.speed.drafts --model FOLDER --dummy --out drafts.jsonl

Variants, each in a process of its own with one engine for all ratios:

    l2kv_model, stock_model      the model drafts for itself, on its whole cache
    l2kv_ngrams, stock_ngrams    n-grams of the request's own tokens
    l2kv, stock                  no drafts

Prompts are passages of `--text`. With `--dummy` weights and prompts are random: times are those of the shape, but the
share of accepted drafts means nothing. A draft model as large as the target cannot be faster; it shows the cost of a
draft model, whose layers never compact, together with compression.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.rows import append
from benchmarks.speed.variants import run_each

VARIANTS = ("l2kv_model", "stock_model", "l2kv_ngrams", "l2kv", "stock", "stock_ngrams")
RATIOS = (1.0, 0.5, 0.25)
START_SECONDS, RATIO_SECONDS = 115, 20
"""Expected seconds of a variant on an H100, with a small model."""
REPEATS = 3
"""Runs of each ratio in turn, since steps of a small model take as long as the host needs to launch them."""
NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 16, 3000, 384
NUM_DRAFTS = 3
MAX_NUM_SEQS = 64


def main() -> None:
    """Starts the variants' processes, or runs as one of them."""
    args = parse()
    if args.inside is not None:
        measure(args)
        return
    run_each("benchmarks.speed.drafts", args.variants, START_SECONDS + len(RATIOS) * RATIO_SECONDS)


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="file whose passages are the prompts")
    parser.add_argument("--dummy", action="store_true", help="use random weights and prompts")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[:5])
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS)
    parser.add_argument("--prompt-tokens", type=int, default=NUM_PROMPT_TOKENS)
    parser.add_argument("--output-tokens", type=int, default=NUM_OUTPUT_TOKENS)
    parser.add_argument("--engine-args", type=json.loads, default={}, help="vLLM's engine arguments, a JSON object")
    parser.add_argument("--inside", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.text is None and not args.dummy:
        parser.error("give --text FILE for the prompts, or --dummy")
    return args


def measure(args: argparse.Namespace) -> None:
    """Measures all ratios of one variant, in this process."""
    begin = time.monotonic()
    llm, about = start_variant(args)
    what = {"variant": args.inside, "model": Path(args.model).name, "dummy": args.dummy, "num_drafts": NUM_DRAFTS}
    about = {**what, **about}
    about["start_s"] = round(time.monotonic() - begin, 1)
    prompts = prompts_of(args)
    ratios = RATIOS if about["engine"] == "l2kv" else (None,)
    for ratio in ratios:
        run(llm, prompts, ratio, args.output_tokens)  # warm-up: the first batch compiles kernels
    runs = [[run(llm, prompts, ratio, args.output_tokens) for ratio in ratios] for _ in range(REPEATS)]
    for ratio, of_ratio in zip(ratios, zip(*runs, strict=True), strict=True):
        by_speed = sorted(of_ratio, key=lambda row: row["tokens_per_s"])
        speeds = [row["tokens_per_s"] for row in of_ratio]
        append(args.out, {**about, "ratio": ratio, **by_speed[REPEATS // 2], "tokens_per_s_of_runs": speeds})


def start_variant(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Starts the engine in this process; returns it, and its fields of a row."""
    import torch

    from benchmarks.speed.engines import start

    engine, _, drafter = args.inside.partition("_")
    method = "ngram_gpu" if torch.cuda.is_available() else "ngram"
    speculative = {
        "": None,
        "model": {"method": "draft_model", "model": args.model},
        "ngrams": {"method": method, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
    }[drafter]
    sizes = {
        "max_model_len": args.prompt_tokens + args.output_tokens,
        "max_num_seqs": MAX_NUM_SEQS,
        "load_format": "dummy" if args.dummy else "auto",
        "enable_prefix_caching": False,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, *range(8, 4 * MAX_NUM_SEQS + 1, 8)]},
    }
    if speculative is not None:
        sizes["speculative_config"] = {**speculative, "num_speculative_tokens": NUM_DRAFTS}
    return start(engine, args.model, True, None, **{**sizes, **args.engine_args})


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    """Returns evenly spaced passages of the text, or random tokens."""
    if args.dummy:
        from benchmarks.speed.engines import random_tokens

        return [random_tokens(i, args.prompt_tokens) for i in range(args.requests)]
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(args.model)(args.text.read_text())["input_ids"]
    step = (len(tokens) - args.prompt_tokens) // args.requests
    if step < 1:
        raise ValueError(
            f"--text has {len(tokens)} tokens, too few for {args.requests} prompts; lower --prompt-tokens."
        )
    return [tokens[i * step : i * step + args.prompt_tokens] for i in range(args.requests)]


def run(llm: Any, prompts: Sequence[list[int]], ratio: float | None, num_output_tokens: int) -> dict[str, Any]:
    """Answers all prompts at once; measures from the first step in which all decode until the first answer ends."""
    from benchmarks.speed.engines import abort_all, add_request, scheduler_of, step_until_all_decode

    scheduler, req_ids = scheduler_of(llm), [str(i) for i in range(len(prompts))]
    for req_id, prompt in zip(req_ids, prompts, strict=True):
        add_request(llm, req_id, prompt, num_output_tokens, **({} if ratio is None else {"keep_ratio": ratio}))
    step_until_all_decode(llm, len(prompts))
    pool = scheduler.kv_cache_manager.block_pool
    held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    counts: Counter[str] = Counter()
    times = list(decode(llm, counts, len(prompts)))
    abort_all(llm, req_ids)
    seconds = sum(times)
    return {
        "load": f"{len(prompts)}x{len(prompts[0])}",
        "tokens_per_s": round(counts["tokens"] / seconds, 1),
        "median_step_ms": round(1000 * statistics.median(times), 3),
        "tokens_per_request_and_step": round(counts["tokens"] / max(counts["sampled"], 1), 3),
        "drafts": counts["drafts"],
        "accepted": round(counts["accepted"] / counts["drafts"], 3) if counts["drafts"] else None,
        "held_blocks": held,
    }


def decode(llm: Any, counts: Counter[str], num_requests: int) -> Iterator[float]:
    """Yields the seconds of each step while all decode; counts tokens, drafts and accepted drafts."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    update = scheduler.update_from_output

    def count(scheduler_output: Any, model_output: Any) -> Any:
        drafted = scheduler_output.scheduled_spec_decode_tokens
        for req_id, tokens in zip(model_output.req_ids, model_output.sampled_token_ids, strict=True):
            counts["tokens"] += len(tokens)
            counts["sampled"] += bool(tokens)
            if tokens and req_id in drafted:
                counts["drafts"] += len(drafted[req_id])
                counts["accepted"] += len(tokens) - 1
        return update(scheduler_output, model_output)

    scheduler.update_from_output = count
    try:
        while len(scheduler.running) == num_requests:
            begin = time.perf_counter()
            llm.llm_engine.step()
            yield time.perf_counter() - begin
    finally:
        del scheduler.update_from_output


if __name__ == "__main__":
    main()
