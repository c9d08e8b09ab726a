"""A cache too small for its requests, in steady state: number of running requests, and throughput.

8,000 prompt tokens and 1,000 generated ones, 16 GiB of KV cache on all GPUs together, always eight requests in the
queue. The first requests, which fill the cache, generate fewer tokens, evenly spread from 1 to 1,000, as on a server
that has been running for long.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.speed.engines import RATIOS, cache_of, is_measured
from benchmarks.speed.steady_state import Asked, Server

CACHE_BYTES = 16 << 30
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 8000, 1000
SETTLE_SECONDS, MEASURED_SECONDS = 2.0, 40.0


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each ratio."""
    for seed, ratio in enumerate(RATIOS, start=1):
        if not is_measured(about, ratio, None, only):
            continue
        asked = Asked(NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, ratio)
        server = Server(llm, asked, lambda chance: (NUM_PROMPT_TOKENS, chance.randint(1, NUM_OUTPUT_TOKENS)), seed)
        with cache_of(llm, CACHE_BYTES // about["num_gpus"], about["block_bytes"]):
            measured = server.measure(SETTLE_SECONDS, MEASURED_SECONDS)
        yield {"cache_bytes": CACHE_BYTES, "keep_ratio": ratio or 1.0, **measured}
