"""A cache too small for its requests, in steady state: how many run at once, and how fast.

8,000 prompt tokens and 1,000 generated ones, 16 GiB of KV cache on all GPUs together, always eight requests in the
queue. The first requests, which fill the cache, generate fewer tokens, evenly spread from 1 to 1,000, as if the server
had been running for long.
"""

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed.engines import RATIOS, abort_all, add_requests, cache_of, is_measured, scheduler_of

CACHE_BYTES = 16 << 30
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, NUM_QUEUED = 8000, 1000, 8
SETTLE_SECONDS, MEASURED_SECONDS = 2.0, 20.0


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each ratio."""
    for seed, ratio in enumerate(RATIOS, start=1):
        if not is_measured(about, ratio, None, only):
            continue
        with cache_of(llm, CACHE_BYTES // about["num_gpus"], about["block_bytes"]):
            yield {"cache_bytes": CACHE_BYTES, "keep_ratio": ratio or 1.0, **Server(llm, ratio, seed).measure()}


@dataclass
class Server:
    """An engine whose queue never runs dry.

    Attributes:
        llm: The engine.
        ratio: Keep ratio, or `None` to ask for nothing.
        seed: For the prompts.
    """

    llm: Any
    ratio: float | None
    seed: int
    unfinished: set[str] = field(default_factory=set)
    waiting_since: dict[str, float] = field(default_factory=dict)
    preempted: dict[str, int] = field(default_factory=dict)
    waits: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def measure(self) -> dict[str, Any]:
        """Fills the cache, lets it settle, then counts."""
        scheduler = scheduler_of(self.llm)
        chance = random.Random(self.seed)
        running = 0
        while not running or len(scheduler.running) > running:
            running = len(scheduler.running)
            self.step(chance.randint(1, NUM_OUTPUT_TOKENS))
        self.run_for(SETTLE_SECONDS)
        self.waits, self.num_tokens = [], 0
        preempted = sum(self.preempted.values())
        elapsed, num_running = self.run_for(MEASURED_SECONDS)
        abort_all(self.llm, list(self.unfinished))
        return {
            "mean_running": round(statistics.fmean(num_running), 2),
            "peak_running": max(num_running),
            "output_tokens_per_s": round(self.num_tokens / elapsed, 1),
            "median_first_token_s": round(statistics.median(self.waits), 2) if self.waits else None,
            "num_first_tokens": len(self.waits),
            "preemptions": sum(self.preempted.values()) - preempted,
            "seconds": round(elapsed, 1),
        }

    def run_for(self, seconds: float) -> tuple[float, list[int]]:
        """Steps for that long; the seconds it took, and how many requests ran in each step."""
        num_running = []
        begin = time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            self.step(NUM_OUTPUT_TOKENS)
            num_running.append(len(scheduler_of(self.llm).running))
        return elapsed, num_running

    def step(self, num_output_tokens: int) -> None:
        """Fills the queue up and makes a step."""
        scheduler = scheduler_of(self.llm)
        while len(scheduler.waiting) < NUM_QUEUED:
            self.seed += 1000
            (req_id,) = add_requests(self.llm, 1, NUM_PROMPT_TOKENS, num_output_tokens, self.ratio, self.seed)
            self.unfinished.add(req_id)
            self.waiting_since[req_id] = time.perf_counter()
        for output in self.llm.llm_engine.step():
            self.num_tokens += len(output.outputs[0].token_ids)
            if output.outputs[0].token_ids and output.request_id in self.waiting_since:
                self.waits.append(time.perf_counter() - self.waiting_since.pop(output.request_id))
            if output.finished:
                self.unfinished.discard(output.request_id)
        self.preempted |= {r.request_id: r.num_preemptions for r in scheduler.waiting if r.num_preemptions}
