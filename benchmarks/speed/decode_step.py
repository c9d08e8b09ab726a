"""Median decode step of a full batch; only steps in which all requests decode are timed."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.engines import abort_all, add_requests, is_measured, scheduler_of, step_until_all_decode

# (requests, prompt tokens, keep ratio or None)
CASES = {
    "1x128": (1, 128, None),
    "8x128": (8, 128, None),
    "64x256": (64, 256, None),
    "32x4000": (32, 4000, None),
    "8x15000": (8, 15000, None),
    "12x15000": (12, 15000, None),
    "24x6000": (24, 6000, None),
    "100x700": (100, 700, None),
    "4x24000": (4, 24000, None),
    "8x15000@0.5": (8, 15000, 0.5),
    "8x15000@0.25": (8, 15000, 0.25),
    "8x15000@0.1": (8, 15000, 0.1),
    # For shapes whose weights leave little room.
    "8x4000": (8, 4000, None),
    "8x4000@0.5": (8, 4000, 0.5),
    "8x4000@0.25": (8, 4000, 0.25),
}
NUM_STEPS = 180


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each case."""
    for seed, (name, (num_requests, num_prompt_tokens, ratio)) in enumerate(CASES.items()):
        if not is_measured(about, ratio, name, only):
            continue
        steps = time_steps(llm, num_requests, num_prompt_tokens, ratio, seed)
        yield {
            "case": name,
            "median_step_ms": round(statistics.median(steps), 3),
            "p10_ms": round(statistics.quantiles(steps, n=10)[0], 3),
            "p90_ms": round(statistics.quantiles(steps, n=10)[-1], 3),
            "num_steps": len(steps),
        }


def time_steps(llm: Any, num_requests: int, num_prompt_tokens: int, ratio: float | None, seed: int) -> list[float]:
    """Returns the milliseconds of the steps in which every request decodes.

    Raises:
        RuntimeError: The KV cache does not hold all requests at once.
    """
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    req_ids = add_requests(llm, num_requests, num_prompt_tokens, NUM_STEPS + num_requests * 4 + 60, ratio, seed)
    step_until_all_decode(llm, num_requests)
    steps = []
    for _ in range(NUM_STEPS):
        begin = time.perf_counter()
        engine.step()
        steps.append((time.perf_counter() - begin) * 1000)
    assert len(scheduler.running) == num_requests
    abort_all(llm, req_ids)
    return steps
