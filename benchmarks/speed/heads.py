"""Engines with and without full KV heads: decode steps, first tokens, and a cache too small for its requests.

python -m benchmarks.speed.shapes 8b FOLDER
python -m benchmarks.speed.heads --model FOLDER --out heads.jsonl [--variants ...] [--cases ...] [--rate 0.1]

Variants, each in a process of its own with one engine for all cases:

    one_call    two full heads of eight in every second layer, both classes of a layer in one call of attention
    equal       no full layers and heads: every head keeps as many rows
    stock       vLLM
    two_calls   as one_call, with a call for each class; not by default

The model needs a `config.json`; weights are random. `--rate` is the keep ratio of the heads that compact; `equal` keeps
in every head the share that takes the same memory. Each row is written as soon as it is measured, so a run that was cut
off can be continued with `--variants` and `--cases`.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed.rows import append
from benchmarks.speed.variants import run_each

VARIANTS = ("one_call", "equal", "stock", "two_calls")
CASES = {"decode": 35, "first_token": 25, "load": 40}
"""Expected seconds of each case on an H100, with an 8B shape."""
START_SECONDS = 80
DECODE = ((1, 128, False), (64, 256, False), (64, 256, True), (24, 6000, False), (24, 6000, True))
DECODE += ((8, 15_000, False), (8, 15_000, True))
"""Requests, prompt tokens, and whether they are compacted."""
LENGTHS = {8000: 15, 30_000: 5}
"""Prompt tokens, and the number of first tokens measured, as many with the prompt compacted."""
MEMORY, CACHE_BYTES, ASKED = 0.25, 16 << 30, (8000, 1000)
"""The load: share of its cache that a compressed request keeps, size of the cache, tokens of prompt and answer."""
SETTLE_SECONDS, MEASURED_SECONDS = 2.0, 15.0
MAX_NUM_SEQS = 128
ENGINE_ARGS = {
    "max_model_len": 131_072,
    "max_num_seqs": MAX_NUM_SEQS,
    # vLLM's sizes up to the largest batch here, so that a start captures fewer graphs and is faster.
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, *range(8, MAX_NUM_SEQS + 1, 8)]},
}


def main() -> None:
    """Starts the variants' processes, or runs as one of them."""
    args = parse()
    if args.inside is not None:
        measure(args)
        return
    run_each("benchmarks.speed.heads", args.variants, START_SECONDS + sum(CASES[case] for case in args.cases))


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[:3])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--rate", type=float, default=0.1, help="keep ratio of heads that compact, in decode and first_token"
    )
    parser.add_argument("--every", type=int, default=2, help="one layer of every N has full heads")
    parser.add_argument("--full", type=int, default=2, help="number of full heads in such a layer")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="vLLM's engine arguments, a JSON object")
    parser.add_argument("--inside", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> None:
    """Measures all cases of one variant, in this process."""
    config = json.loads((Path(args.model) / "config.json").read_text())
    full_heads = chosen(config["num_hidden_layers"], config["num_key_value_heads"], args.every, args.full)
    share = sum(map(len, full_heads.values())) / (config["num_hidden_layers"] * config["num_key_value_heads"])
    begin = time.monotonic()
    llm, about = start_variant(args.inside, args.model, full_heads, args.engine_args)
    start_s = round(time.monotonic() - begin, 1)
    about = {"variant": args.inside, "full_heads": share, "rate": args.rate, "start_s": start_s, **about}
    rows = {"decode": decode, "first_token": first_token, "load": load}
    for case in args.cases:
        for row in rows[case](llm, about, share, args.rate):
            append(args.out, {**about, "case": case, **row})


def chosen(num_layers: int, num_heads: int, every: int, num_full: int) -> dict[int, tuple[int, ...]]:
    """Returns full heads in one layer of `every`; which heads varies by layer, as in a profile."""
    chance = random.Random(0)
    return {layer: tuple(sorted(chance.sample(range(num_heads), num_full))) for layer in range(0, num_layers, every)}


def start_variant(
    variant: str, model: str, full_heads: dict[int, tuple[int, ...]], engine_args: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Starts the engine in this process; returns it, and its fields of a row."""
    from benchmarks.speed.engines import start
    from vllm_l2kv.worker import gpu

    if variant == "two_calls":
        # Only for the comparison: no layer decodes in one call.
        gpu.takes_one_call = lambda _: False
    settings = {"full_layers": ()}
    if variant in ("one_call", "two_calls"):
        settings["full_heads"] = full_heads
    engine = "stock" if variant == "stock" else "l2kv"
    return start(engine, model, True, settings, **{**ENGINE_ARGS, **engine_args})


def ratio_of(variant: str, share: float, rate: float) -> float | None:
    """Returns the keep ratio at which a variant keeps the same memory; `None` for stock vLLM, which keeps all."""
    return {"stock": None, "equal": share + (1 - share) * rate}.get(variant, rate)


def decode(llm: Any, about: dict[str, Any], share: float, rate: float) -> Iterator[dict[str, Any]]:
    """Yields rows of median steps in which all requests decode."""
    from benchmarks.speed.decode_step import time_steps

    for seed, (num_requests, num_tokens, is_compacted) in enumerate(DECODE):
        ratio = ratio_of(about["variant"], share, rate) if is_compacted else None
        if is_compacted and ratio is None:
            continue
        steps = time_steps(llm, num_requests, num_tokens, ratio, seed)
        yield {
            "load": f"{num_requests}x{num_tokens}",
            "compacted": is_compacted,
            "median_step_ms": round(statistics.median(steps), 3),
            "p90_ms": round(statistics.quantiles(steps, n=10)[-1], 3),
        }


def first_token(llm: Any, about: dict[str, Any], share: float, rate: float) -> Iterator[dict[str, Any]]:
    """Yields rows of median times to the first token of one request on an idle engine."""
    from benchmarks.speed.first_token import run

    ratio = ratio_of(about["variant"], share, rate)
    cases = [(*of_length, asked) for of_length in LENGTHS.items() for asked in dict.fromkeys((None, ratio))]
    for i, (num_tokens, repeats, asked) in enumerate(cases):
        # The first one warms up. No two prompts are equal, so none is found.
        _, *times = (run(llm, num_tokens, asked, None, 1000 * (i + 1) + n) for n in range(repeats + 1))
        yield {
            "load": f"1x{num_tokens}",
            "compacted": asked is not None,
            "median_first_token_ms": round(statistics.median(times), 2),
            "first_token_ms": [round(ms, 2) for ms in times],
        }


def load(llm: Any, about: dict[str, Any], share: float, rate: float) -> Iterator[dict[str, Any]]:
    """Yields rows of requests running and output tokens per second, in a cache that a few whole requests fill."""
    from benchmarks.speed.engines import cache_of
    from benchmarks.speed.steady_state import Asked, Server

    num_prompt_tokens, num_output_tokens = ASKED
    ratio = ratio_of(about["variant"], share, (MEMORY - share) / (1 - share))
    asked = Asked(num_prompt_tokens, num_output_tokens, ratio)
    server = Server(llm, asked, lambda chance: (num_prompt_tokens, chance.randint(1, num_output_tokens)), 7)
    with cache_of(llm, CACHE_BYTES, about["block_bytes"]):
        yield {
            "load": "16 GiB",
            "memory": MEMORY if ratio else 1.0,
            "ratio": ratio,
            **server.measure(SETTLE_SECONDS, MEASURED_SECONDS),
        }


if __name__ == "__main__":
    main()
