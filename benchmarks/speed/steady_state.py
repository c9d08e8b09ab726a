"""An engine whose queue is never empty, like a server that has been running for long."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed.engines import abort_all, add_requests, scheduler_of

NUM_QUEUED = 8
STEPS_TO_FILL = 12
"""The cache counts as full after this many steps in which no request begins."""


@dataclass(frozen=True)
class Asked:
    """Parameters of every request.

    Attributes:
        num_prompt_tokens: Length of its prompt.
        num_output_tokens: Length of its answer.
        ratio: Keep ratio, or `None` for none.
        budget: `kv_max_tokens`, or `None` for none.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    ratio: float | None = None
    budget: int | None = None


@dataclass
class Server:
    """An engine with requests in its queue.

    Attributes:
        llm: The engine, in this process.
        asked: Parameters of its requests.
        part_way: Returns prompt and answer tokens of one of the first requests, as if it had been running.
        seed: Seed of the prompts.
    """

    llm: Any
    asked: Asked
    part_way: Callable[[random.Random], tuple[int, int]]
    seed: int
    unfinished: set[str] = field(default_factory=set)
    waiting_since: dict[str, float] = field(default_factory=dict)
    last_token: dict[str, float] = field(default_factory=dict)
    preempted: dict[str, int] = field(default_factory=dict)
    waits: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def measure(self, settle_seconds: float, measured_seconds: float) -> dict[str, Any]:
        """Fills the cache, waits for a steady state, then counts."""
        scheduler = scheduler_of(self.llm)
        chance = random.Random(self.seed)
        running, steps_without = 0, 0
        while steps_without < STEPS_TO_FILL:
            self.step(self.part_way(chance))
            grown = len(scheduler.running) > running
            running, steps_without = max(running, len(scheduler.running)), 0 if grown else steps_without + 1
        self.run_for(settle_seconds)
        self.waits, self.gaps, self.num_tokens = [], [], 0
        preempted = sum(self.preempted.values())
        elapsed, num_running = self.run_for(measured_seconds)
        abort_all(self.llm, list(self.unfinished))
        return {
            "mean_running": round(statistics.fmean(num_running), 2),
            "peak_running": max(num_running),
            "output_tokens_per_s": round(self.num_tokens / elapsed, 1),
            "median_first_token_s": round(statistics.median(self.waits), 2) if self.waits else None,
            "num_first_tokens": len(self.waits),
            "median_gap_ms": round(statistics.median(self.gaps) * 1000, 2),
            "p99_gap_ms": round(statistics.quantiles(self.gaps, n=100)[-1] * 1000, 2),
            "preemptions": sum(self.preempted.values()) - preempted,
            "seconds": round(elapsed, 1),
        }

    def run_for(self, seconds: float) -> tuple[float, list[int]]:
        """Runs steps for that long; returns the seconds it took, and the number of running requests in each step."""
        num_running = []
        begin = time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            self.step((self.asked.num_prompt_tokens, self.asked.num_output_tokens))
            num_running.append(len(scheduler_of(self.llm).running))
        return elapsed, num_running

    def step(self, lengths: tuple[int, int]) -> None:
        """Fills the queue with requests of these prompt and answer tokens, and runs a step."""
        scheduler = scheduler_of(self.llm)
        while len(scheduler.waiting) < NUM_QUEUED:
            self.seed += 1000
            (req_id,) = add_requests(self.llm, 1, *lengths, self.asked.ratio, self.seed, self.asked.budget)
            self.unfinished.add(req_id)
            self.waiting_since[req_id] = time.perf_counter()
        outputs = self.llm.llm_engine.step()
        now = time.perf_counter()
        for output in outputs:
            num_tokens, req_id = len(output.outputs[0].token_ids), output.request_id
            self.num_tokens += num_tokens
            if num_tokens and req_id in self.waiting_since:
                self.waits.append(now - self.waiting_since.pop(req_id))
            elif num_tokens:
                self.gaps.append(now - self.last_token[req_id])
            self.last_token[req_id] = now
            if output.finished:
                self.unfinished.discard(req_id)
        self.preempted |= {r.request_id: r.num_preemptions for r in scheduler.waiting if r.num_preemptions}
