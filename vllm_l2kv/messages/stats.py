"""Statistics of compactions that an engine core reports to its front ends, for `/metrics`.

vLLM's `SchedulerStats` carry them, in the field of KV connectors. At every step one front end of each engine receives
them, with any number of engines and API processes. So each event is reported once, and Prometheus' client adds up over
processes. The front end must remove the statistics before vLLM reads the field, so an engine reports them only if its
front end does that (`Settings.metrics`).
"""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

_KEY = "l2kv"


class CompactionEvent(NamedTuple):
    """One compaction, as the statistics count it.

    Attributes:
        kind: One of `policy.Kind`.
        num_kept: Rows that each head of a compressed layer kept.
        num_evicted: Rows that each head evicted.
    """

    kind: str
    num_kept: int
    num_evicted: int


@dataclass
class CompactionStats:
    """Events since the last report, and the current state.

    Attributes:
        compactions: Compactions carried out; repeated after a preemption, since the work is repeated.
        num_compressed: Requests that were compacted for the first time.
        num_freed_blocks: Blocks that compactions returned to the pool, without those that other requests still hold.
        num_taken_blocks: Blocks that compactions took from the pool for kept rows.
        num_found_tokens: Prompt tokens whose compacted rows were found in the cache.
        num_published: Compacted prefixes of prompts that were added to the prefix cache.
        num_preempted: Requests that were preempted to free blocks for a compaction.
        seconds: Seconds that each step's compactions took on the device.
        logical_tokens: Positions of running requests.
        physical_tokens: Rows of running requests in compressed layers.
        memory_ratio: Memory that running requests hold, divided by what they would hold uncompressed; 1 if none runs.
    """

    compactions: list[CompactionEvent] = field(default_factory=list)
    num_compressed: int = 0
    num_freed_blocks: int = 0
    num_taken_blocks: int = 0
    num_found_tokens: int = 0
    num_published: int = 0
    num_preempted: int = 0
    seconds: list[float] = field(default_factory=list)
    logical_tokens: int = 0
    physical_tokens: int = 0
    memory_ratio: float = 1.0


def attach_stats(scheduler_stats: Any, stats: CompactionStats) -> None:
    """Puts statistics on vLLM's `SchedulerStats`, beside those of a KV connector."""
    scheduler_stats.kv_connector_stats = {**(scheduler_stats.kv_connector_stats or {}), _KEY: asdict(stats)}


def take_stats(scheduler_stats: Any) -> CompactionStats | None:
    """Removes the statistics from vLLM's `SchedulerStats` and returns them; `None` if there are none."""
    others = dict(scheduler_stats.kv_connector_stats or {})
    stats = others.pop(_KEY, None)
    if stats is None:
        return None
    scheduler_stats.kv_connector_stats = others or None
    events = [CompactionEvent(*event) for event in stats.pop("compactions")]
    return CompactionStats(compactions=events, **stats)
