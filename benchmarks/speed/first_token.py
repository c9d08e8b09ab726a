"""Time to first token of one request on an idle engine, that is, of its prefill."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.engines import abort_all, add_requests, is_measured

LENGTHS = {1000: 9, 8000: 5, 15_000: 5, 30_000: 3}
LONG_LENGTHS = {30_000: 3, 60_000: 2, 120_000: 2}
"""Prompt tokens, and the number of measurements of each."""
RATIOS = (None, 0.5)
BUDGET = 4096

# (prompt tokens, repeats, keep ratio or None, budget or None)
CASES = [
    *((length, repeats, ratio, None) for length, repeats in LENGTHS.items() for ratio in RATIOS),
    *((length, repeats, None, None) for length, repeats in LONG_LENGTHS.items() if length not in LENGTHS),
    *((length, repeats, None, BUDGET) for length, repeats in LONG_LENGTHS.items()),
]


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each case."""
    seed = 1000
    for num_prompt_tokens, repeats, ratio, budget in CASES:
        if not is_measured(about, ratio or budget, str(num_prompt_tokens), only):
            continue
        times = []
        for _ in range(repeats + 1):
            seed += 1
            times.append(run(llm, num_prompt_tokens, ratio, budget, seed))
        yield {
            "num_prompt_tokens": num_prompt_tokens,
            "keep_ratio": ratio or 1.0,
            "budget": budget,
            "median_first_token_ms": round(statistics.median(times[1:]), 2),
            "repeats": repeats,
        }


def run(llm: Any, num_prompt_tokens: int, ratio: float | None, budget: int | None, seed: int) -> float:
    """Returns the milliseconds from the request to its first token."""
    req_ids = add_requests(llm, 1, num_prompt_tokens, 8, ratio, seed, budget)
    begin = time.perf_counter()
    while not any(output.outputs[0].token_ids for output in llm.llm_engine.step()):
        pass
    milliseconds = (time.perf_counter() - begin) * 1000
    abort_all(llm, req_ids)
    return milliseconds
