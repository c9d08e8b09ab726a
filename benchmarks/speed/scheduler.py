"""Processor time of the schedulers of stock vLLM and of vllm-l2kv, without an engine.

For requests that all decode, and for one that decodes while another waits because the cache is full.

PYTHONPATH=tests VLLM_CPU_KVCACHE_SPACE=1 python -m benchmarks.speed.scheduler --model FOLDER --out scheduler.jsonl

No device is needed; the model needs a `config.json` with a context of 131,072 tokens, as `shapes.py` writes it. Each
decoding request has 256 prompt tokens and generates 256.
"""

import argparse
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bare_scheduler import add_request, plan
from vllm import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput

import vllm_l2kv
from benchmarks.speed.engines import random_tokens
from benchmarks.speed.rows import append, where

NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, REPEATS = 256, 256, 256, 5
NUM_LAYERS, NUM_BLOCKS = 32, 30_000
STEPS_IN_FLIGHT = 2
FULL_LAYERS = {"stock": None, "l2kv": (0, 1)}
ENGINE_ARGS = {
    "skip_tokenizer_init": True,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": NUM_REQUESTS,
}
CASES = (("stock", None), ("l2kv", None), ("l2kv", 0.5))
WAITING: dict[str, Callable[[int], dict[str, Any]]] = {
    "nothing": lambda _: {},
    "document": lambda num_tokens: {"keep_ratio": 0.25, "prefix_tokens": num_tokens - NUM_QUESTION_TOKENS},
    "budget": lambda _: {"max_tokens": 2048},
}
"""Arguments of a waiting request's `compression`, by the length of its prompt."""
WAITING_CASES = [
    (engine, what, num_tokens, is_found)
    for num_tokens in (10_000, 100_000)
    for is_found in (False, True)
    for engine, what in (("stock", "nothing"), *(("l2kv", what) for what in WAITING))
]
NUM_QUESTION_TOKENS, NUM_FREE_BLOCKS, NUM_STEPS = 2000, 64, 300


def main() -> None:
    """Times all cases in turn, so that a slow moment of the machine affects all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for row in (*time_decoding(args.model), *time_waiting(args.model)):
        append(args.out, {**where(), **row})


def time_decoding(model: str) -> Iterator[dict[str, Any]]:
    """Yields a row for each case of requests that all decode."""
    schedulers = {engine: planned.make() for engine, planned in plans(model, 2048).items()}
    milliseconds: dict[Any, list[float]] = {case: [] for case in CASES}
    for repeat in range(REPEATS + 1):  # the first warms up
        for number, (engine, ratio) in enumerate(CASES):
            elapsed = run(schedulers[engine], ratio, seed=repeat * len(CASES) + number)
            milliseconds[engine, ratio] += [elapsed] if repeat else []
    for (engine, ratio), times in milliseconds.items():
        row = {"engine": engine, "keep_ratio": ratio or 1.0, "num_requests": NUM_REQUESTS}
        yield {**row, "ms_per_step": round(statistics.median(times), 3)}


def time_waiting(model: str) -> Iterator[dict[str, Any]]:
    """Yields a row for each case of a request that waits."""
    of_engine = plans(model, 131_072)
    milliseconds: dict[Any, list[float]] = {case: [] for case in WAITING_CASES}
    for repeat in range(REPEATS + 1):  # the first warms up
        for case in WAITING_CASES:
            engine, what, num_tokens, is_found = case
            elapsed = wait(of_engine[engine].make(), num_tokens, WAITING[what](num_tokens), is_found)
            milliseconds[case] += [elapsed] if repeat else []
    for (engine, what, num_tokens, is_found), times in milliseconds.items():
        row = {"engine": engine, "waiting": what, "num_prompt_tokens": num_tokens, "is_found": is_found}
        row["num_question_tokens"] = NUM_QUESTION_TOKENS
        yield {**row, "ms_per_step": round(statistics.median(times), 4)}


def plans(model: str, max_model_len: int) -> dict[str, Any]:
    """Returns the plans from which the schedulers of both engines are made."""
    arguments = {**ENGINE_ARGS, "max_model_len": max_model_len}
    return {
        engine: plan(model, NUM_BLOCKS, full_layers, NUM_LAYERS, is_async=True, **arguments)
        for engine, full_layers in FULL_LAYERS.items()
    }


def run(scheduler: Any, ratio: float | None, seed: int) -> float:
    """Returns the milliseconds per step, from the first prefill to the last token."""
    tokens = random_tokens(seed, NUM_REQUESTS * NUM_PROMPT_TOKENS)
    for i in range(NUM_REQUESTS):
        prompt = tokens[i * NUM_PROMPT_TOKENS : (i + 1) * NUM_PROMPT_TOKENS]
        ask(scheduler, f"{seed}-{i}", prompt, NUM_OUTPUT_TOKENS, keep_ratio=ratio)
    in_flight: deque[Any] = deque()
    times = []
    while scheduler.has_unfinished_requests():
        times.append(step(scheduler, in_flight))
    while in_flight:
        scheduler.update_from_output(*in_flight.popleft())
    return sum(times) / len(times)


def wait(scheduler: Any, num_tokens: int, asked: dict[str, Any], is_found: bool) -> float:
    """Returns the milliseconds of a median step in which one request decodes and another waits for blocks.

    Args:
        scheduler: A new scheduler.
        num_tokens: Length of each prompt.
        asked: Arguments of both requests' `compression`.
        is_found: Whether both ask about the same document, so that its rows are in the cache.
    """
    document, *questions = (
        random_tokens(seed, n)
        for seed, n in enumerate((num_tokens - NUM_QUESTION_TOKENS, NUM_QUESTION_TOKENS, NUM_QUESTION_TOKENS))
    )
    other = document if is_found else random_tokens(3, len(document))
    pool, in_flight = scheduler.kv_cache_manager.block_pool, deque()
    ask(scheduler, "decodes", other + questions[0], NUM_STEPS + 100, **asked)
    while scheduler.requests["decodes"].num_output_tokens < 4:
        step(scheduler, in_flight)
    pool.get_new_blocks(pool.get_num_free_blocks() - NUM_FREE_BLOCKS)
    ask(scheduler, "waits", document + questions[1], 1, **asked)
    times = [step(scheduler, in_flight) for _ in range(NUM_STEPS)]
    assert len(scheduler.running) == len(scheduler.waiting) == 1
    return statistics.median(times)


def step(scheduler: Any, in_flight: deque[Any]) -> float:
    """Schedules a step and processes the result of an earlier one; returns the milliseconds of both."""
    begin = time.thread_time()
    output = scheduler.schedule()
    elapsed = time.thread_time() - begin
    in_flight.append((output, sampled(scheduler, output)))
    if len(in_flight) == STEPS_IN_FLIGHT:
        begin = time.thread_time()
        scheduler.update_from_output(*in_flight.popleft())
        elapsed += time.thread_time() - begin
    return elapsed * 1000


def ask(scheduler: Any, req_id: str, prompt: list[int], num_output_tokens: int, **asked: Any) -> None:
    """Adds a request; `asked` are arguments of `vllm_l2kv.compression`."""
    extra_args = vllm_l2kv.compression(**asked) or None
    params = SamplingParams(max_tokens=num_output_tokens, ignore_eos=True, extra_args=extra_args)
    add_request(scheduler, req_id, prompt, params)


def sampled(scheduler: Any, output: Any) -> Any:
    """Returns a worker's result: one token for every request whose prefill ends or is over."""
    req_ids = list(output.num_scheduled_tokens)
    requests = [scheduler.requests[req_id] for req_id in req_ids]
    return ModelRunnerOutput(
        req_ids=req_ids,
        req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
        sampled_token_ids=[[7] if r.num_computed_tokens >= r.num_prompt_tokens else [] for r in requests],
    )


if __name__ == "__main__":
    main()
