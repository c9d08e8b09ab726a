"""Short prompts and more memory than they need: whoever compresses must lose nothing."""

import time
from collections.abc import Iterator
from typing import Any

from engines import MAX_NUM_SEQS, add_requests

NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 256, 256
RATIOS = (None, 0.5, 0.25, 0.1)


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each ratio: twice as many requests as run at once, until the last is done."""
    num_requests = 2 * MAX_NUM_SEQS
    run(llm, MAX_NUM_SEQS, None, seed=100)  # warms up
    for seed, ratio in enumerate(RATIOS, start=101):
        if (ratio is not None and about["engine"] == "stock") or (only and str(ratio or 1.0) not in only):
            continue
        yield {
            "keep_ratio": ratio or 1.0,
            "num_requests": num_requests,
            "output_tokens_per_s": round(num_requests * NUM_OUTPUT_TOKENS / run(llm, num_requests, ratio, seed), 1),
        }


def run(llm: Any, num_requests: int, ratio: float | None, seed: int) -> float:
    """Seconds until all are done."""
    add_requests(llm, num_requests, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, ratio, seed)
    begin = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return time.perf_counter() - begin
