"""Long answers in a small cache, in steady state: number of running requests, and throughput.

512 prompt tokens and 8,000 generated ones, 8 GiB of KV cache, always eight requests in the queue. The first requests,
which fill the cache, have a part of their answer in the prompt, as on a server that has been running for long.
"""

import random
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.compaction_counter import CompactionCounter
from benchmarks.speed.engines import cache_of, is_measured
from benchmarks.speed.steady_state import Asked, Server

CACHE_BYTES = 8 << 30
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 512, 8000
BUDGETS = (None, 2048, 1024)
SETTLE_SECONDS, MEASURED_SECONDS = 5.0, 60.0


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each budget."""
    for seed, budget in enumerate(BUDGETS, start=1):
        if not is_measured(about, budget, str(budget), only) or (budget is None and about["engine"] == "l2kv"):
            continue
        server = Server(llm, Asked(NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, budget=budget), part_way, seed)
        with cache_of(llm, CACHE_BYTES // about["num_gpus"], about["block_bytes"]), CompactionCounter(llm) as counter:
            measured = server.measure(SETTLE_SECONDS, MEASURED_SECONDS)
            seconds = sum(counter.seconds_since(measured["seconds"]))
        share = round(seconds / measured["seconds"], 5)
        yield {"cache_bytes": CACHE_BYTES, "budget": budget, **measured, "compaction_share": share}


def part_way(chance: random.Random) -> tuple[int, int]:
    """Returns prompt and answer tokens of a request that has generated part of its answer."""
    generated = chance.randrange(NUM_OUTPUT_TOKENS)
    return NUM_PROMPT_TOKENS + generated, NUM_OUTPUT_TOKENS - generated
