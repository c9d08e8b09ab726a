"""Short prompts and more memory than they need: compression must not make requests slower."""

import time
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.engines import MAX_NUM_SEQS, RATIOS, add_requests, is_measured

NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, REPEATS = 256, 256, 3


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """Yields a row for each ratio: a full batch of requests until the last one ends; ratios take turns."""
    ratios = [ratio for ratio in RATIOS if is_measured(about, ratio, None, only)]
    seed = 100
    seconds: dict[float | None, list[float]] = {ratio: [] for ratio in ratios}
    for i in range(REPEATS + 1):  # the first warms up
        for ratio in ratios:
            seed += 1
            elapsed = run(llm, MAX_NUM_SEQS, ratio, seed)
            if i:
                seconds[ratio].append(elapsed)
    for ratio, times in seconds.items():
        yield {
            "keep_ratio": ratio or 1.0,
            "num_requests": MAX_NUM_SEQS,
            "output_tokens_per_s": [round(MAX_NUM_SEQS * NUM_OUTPUT_TOKENS / elapsed, 1) for elapsed in times],
        }


def run(llm: Any, num_requests: int, ratio: float | None, seed: int) -> float:
    """Returns the seconds until all requests have ended."""
    add_requests(llm, num_requests, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, ratio, seed)
    begin = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return time.perf_counter() - begin
