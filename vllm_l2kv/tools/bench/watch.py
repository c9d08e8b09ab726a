"""Samples a server under load: its `/metrics`, and its memory if it runs on this machine."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import httpx

OWN_PREFIX = "vllm_l2kv:"
LEVELS = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = ("num_preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total")
WANTED = (*(f"vllm:{name}" for name in (*LEVELS, *COUNTERS)), "process_resident_memory_bytes", OWN_PREFIX)
"""Prefixes of the lines that are parsed. Parsing the hundreds of others would delay the reading of tokens."""
HISTOGRAM = ("_bucket", "_sum", "_count", "_created")
"""Suffixes of the samples that belong to a histogram or summary."""

Metrics = dict[str, float]
"""Metric names to values."""
Memory = Callable[[], dict[str, int]]
"""Returns bytes by the kind of memory."""


@dataclass
class Sample:
    """The state of the server at one time."""

    at_s: float
    """Seconds since the watch began."""
    running: float | None
    waiting: float | None
    kv_cache_usage: float | None
    """Share of the KV cache's blocks that requests hold, mean over engines; `None` if the server did not report it."""
    memory: dict[str, int]
    own: dict[str, float] = field(default_factory=dict)
    """Metrics of vllm-l2kv; empty if the server has none."""


@dataclass
class Watch:
    """The samples of a round."""

    samples: list[Sample] = field(default_factory=list)
    counted: dict[str, float] = field(default_factory=dict)
    """Increase of each counter of the server."""
    num_failed: int = 0
    """Number of samples to which the server did not answer."""

    def rows(self) -> list[dict[str, Any]]:
        """The samples as JSON-serializable dicts."""
        return [asdict(sample) for sample in self.samples]


@asynccontextmanager
async def watching(http: httpx.AsyncClient, interval_s: float, memory: Memory) -> AsyncIterator[Watch]:
    """Samples the server until the block ends; counters are read right before and right after it.

    Args:
        http: HTTP client of the server.
        interval_s: Seconds between samples.
        memory: Returns the server's memory on this machine.
    """
    watch, begin = Watch(), perf_counter()
    before = await _read(http, watch)
    sampler = asyncio.create_task(_sample(http, watch, begin, interval_s, memory))
    try:
        yield watch
    finally:
        sampler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampler
    after = await _read(http, watch)
    # A counter with labels does not exist before it first counts.
    if before:
        watch.counted = {name: after[name] - before.get(name, 0) for name in after if name.endswith("_total")}


async def _sample(http: httpx.AsyncClient, watch: Watch, begin: float, interval_s: float, memory: Memory) -> None:
    while True:
        await asyncio.sleep(interval_s)
        at_s = perf_counter() - begin
        counted = await asyncio.to_thread(memory)
        metrics = await _read(http, watch)
        if process := metrics.get("process_resident_memory_bytes"):
            counted["process"] = int(process)
        running, waiting, in_use = (metrics.get(f"vllm:{name}") for name in LEVELS)
        own = {name: value for name, value in metrics.items() if name.startswith(OWN_PREFIX)}
        watch.samples.append(Sample(at_s, running, waiting, in_use, counted, own))


async def _read(http: httpx.AsyncClient, watch: Watch) -> Metrics:
    """Metrics by name; empty if the server does not answer, which must not end the test."""
    try:
        response = await http.get("/metrics", timeout=30)
        return totals(response.raise_for_status().text)
    except (httpx.HTTPError, ValueError):
        watch.num_failed += 1
        return {}


def totals(text: str) -> Metrics:
    """Values of the wanted metrics, summed over labels; shares (`_perc`) are averaged."""
    from prometheus_client.parser import text_string_to_metric_families

    wanted = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(WANTED))
    values: defaultdict[str, list[float]] = defaultdict(list)
    for family in text_string_to_metric_families(wanted):
        for sample in family.samples:
            if not sample.name.endswith(HISTOGRAM):
                values[sample.name].append(sample.value)
    return {name: sum(found) / (len(found) if name.endswith("_perc") else 1) for name, found in values.items()}
