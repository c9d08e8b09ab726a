"""Processor time of the scheduler alone, without an engine: stock vLLM's and ours, for requests that all decode.

PYTHONPATH=tests VLLM_CPU_KVCACHE_SPACE=1 python -m benchmarks.speed.scheduler --model FOLDER --out scheduler.jsonl

No device is needed; the model needs a `config.json`. Every request has 256 prompt tokens and generates 256.
"""

import argparse
import random
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from bare_scheduler import add_request, plan
from vllm import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput

import vllm_l2kv
from benchmarks.speed.rows import append, where

NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, REPEATS = 256, 256, 256, 5
NUM_LAYERS, NUM_BLOCKS = 32, 30_000
STEPS_IN_FLIGHT = 2
FULL_LAYERS = {"stock": None, "l2kv": (0, 1)}
ENGINE_ARGS = {
    "skip_tokenizer_init": True,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": NUM_REQUESTS,
    "max_model_len": 2048,
}
CASES = (("stock", None), ("l2kv", None), ("l2kv", 0.5))


def main() -> None:
    """Times all cases in turn, so that a slow moment of the machine strikes each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    schedulers = {
        engine: plan(args.model, NUM_BLOCKS, full_layers, NUM_LAYERS, is_async=True, **ENGINE_ARGS).make()
        for engine, full_layers in FULL_LAYERS.items()
    }
    milliseconds: dict[Any, list[float]] = {case: [] for case in CASES}
    for repeat in range(REPEATS + 1):  # the first warms up
        for number, (engine, ratio) in enumerate(CASES):
            elapsed = run(schedulers[engine], ratio, seed=repeat * len(CASES) + number)
            milliseconds[engine, ratio] += [elapsed] if repeat else []
    for (engine, ratio), times in milliseconds.items():
        row = {"engine": engine, "keep_ratio": ratio or 1.0, "num_requests": NUM_REQUESTS}
        row["ms_per_step"] = round(statistics.median(times), 3)
        append(args.out, {**where(), **row})


def run(scheduler: Any, ratio: float | None, seed: int) -> float:
    """Milliseconds a step, from the first prefill to the last token."""
    add_requests(scheduler, ratio, seed)
    in_flight: deque[Any] = deque()
    num_steps, elapsed = 0, 0.0
    while scheduler.has_unfinished_requests():
        begin = time.thread_time()
        output = scheduler.schedule()
        elapsed += time.thread_time() - begin
        in_flight.append((output, sampled(scheduler, output)))
        num_steps += 1
        if len(in_flight) == STEPS_IN_FLIGHT:
            begin = time.thread_time()
            scheduler.update_from_output(*in_flight.popleft())
            elapsed += time.thread_time() - begin
    while in_flight:
        scheduler.update_from_output(*in_flight.popleft())
    return elapsed * 1000 / num_steps


def add_requests(scheduler: Any, ratio: float | None, seed: int) -> None:
    """Requests with random prompts, which share nothing."""
    chance = random.Random(seed)
    extra_args = None if ratio is None else vllm_l2kv.compression(ratio)
    params = SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, extra_args=extra_args)
    for i in range(NUM_REQUESTS):
        prompt = [chance.randrange(40_000) for _ in range(NUM_PROMPT_TOKENS)]
        add_request(scheduler, f"{seed}-{i}", prompt, params.clone())


def sampled(scheduler: Any, output: Any) -> Any:
    """What a worker answers: one token for every request whose prefill ends or is over."""
    req_ids = list(output.num_scheduled_tokens)
    done = [scheduler.requests[r].num_computed_tokens >= NUM_PROMPT_TOKENS for r in req_ids]
    return ModelRunnerOutput(
        req_ids=req_ids,
        req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
        sampled_token_ids=[[7] if is_done else [] for is_done in done],
    )


if __name__ == "__main__":
    main()
