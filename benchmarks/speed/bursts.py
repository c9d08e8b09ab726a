"""Duration of steps in which many requests are compacted, since requests that begin together are due together.

64 requests of 128 prompt tokens, one prefill step for all of them, and a budget of 1,024. Every 256 tokens of their
answers, all 64 are compacted in one step. Stock vLLM answers them too, uncompressed.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.compaction_counter import CompactionCounter
from benchmarks.speed.engines import abort_all, add_requests, step_until_all_decode

NUM_REQUESTS, NUM_PROMPT_TOKENS, BUDGET = 64, 128, 1024
NUM_STEPS = 3200
STEPS_OF_A_BURST = 3
"""A step's result is read while the next one runs, so its time may appear one or two steps later."""


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """One row."""
    if only and "bursts" not in only:
        return
    budget = None if about["engine"] == "stock" else BUDGET
    with CompactionCounter(llm) as counter:
        steps, compactions = time_steps(llm, counter, budget)
    bursts = [i for i, num in enumerate(compactions) if num]
    slowest = [max(steps[i : i + STEPS_OF_A_BURST]) for i in bursts]
    near = {i + offset for i in bursts for offset in range(STEPS_OF_A_BURST)}
    others = [step for i, step in enumerate(steps) if i not in near]
    yield {
        "num_requests": NUM_REQUESTS,
        "budget": budget,
        "num_steps": len(steps),
        "bursts": [compactions[i] for i in bursts],
        "median_step_ms": round(statistics.median(others), 3),
        "p99_step_ms": round(statistics.quantiles(others, n=100)[-1], 3),
        "burst_steps_ms": [round(step, 3) for step in slowest],
        "compaction_ms": [round(seconds * 1000, 3) for _, seconds in counter.seconds],
    }


def time_steps(llm: Any, counter: CompactionCounter, budget: int | None) -> tuple[list[float], list[int]]:
    """Returns the milliseconds of each step after the prefill, and the compactions that it planned."""
    req_ids = add_requests(llm, NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_STEPS + 400, None, 77, budget)
    step_until_all_decode(llm, NUM_REQUESTS)
    steps, compactions = [], []
    for _ in range(NUM_STEPS):
        before, begin = counter.num_compactions, time.perf_counter()
        llm.llm_engine.step()
        steps.append((time.perf_counter() - begin) * 1000)
        compactions.append(counter.num_compactions - before)
    abort_all(llm, req_ids)
    return steps, compactions
