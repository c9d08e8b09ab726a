"""Statistics of compactions that an engine core reports to its front ends, for `/metrics`.

They travel on vLLM's `SchedulerStats`, which reach one front end of each engine at every step, with any number of
engines and API processes. So each event is reported once, and Prometheus' client adds up over processes. The field is
that of KV connectors, which are refused beside compression. The front end must take the statistics off before vLLM
reads the field, so an engine reports them only if its front end does that (`Settings.metrics`).
"""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

_KEY = "l2kv"


class CompactionEvent(NamedTuple):
    """One compaction, as statistics count it.

    Attributes:
        kind: One of `policy.Kind`.
        num_kept: Rows that each head of a compressed layer kept.
        num_evicted: Rows that it evicted.
    """

    kind: str
    num_kept: int
    num_evicted: int


@dataclass
class CompactionStats:
    """Events since the last report, and the current state.

    Attributes:
        compactions: What was compacted; again after a preemption, since the work is done again.
        num_compressed: Requests that were compacted for the first time, each once.
        num_freed_blocks: Blocks that compactions gave back to the pool; those that other requests hold stay.
        num_taken_blocks: Blocks that compactions took for kept rows.
        num_found_tokens: Tokens of prompts whose compacted rows were found in the cache.
        num_published: Compacted beginnings of prompts that became findable.
        num_preempted: Requests that were preempted so that a compaction finds blocks for its kept rows.
        seconds: Time on the device of each step's compactions.
        logical_tokens: Tokens of running requests, as their positions count.
        physical_tokens: The same in rows that they fill in compressed layers.
        memory_ratio: Memory of the whole cache that they hold, over what they would hold uncompressed; 1 if none runs.
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
    """Takes statistics off vLLM's `SchedulerStats`, if they are there."""
    others = dict(scheduler_stats.kv_connector_stats or {})
    stats = others.pop(_KEY, None)
    if stats is None:
        return None
    scheduler_stats.kv_connector_stats = others or None
    events = [CompactionEvent(*event) for event in stats.pop("compactions")]
    return CompactionStats(compactions=events, **stats)
