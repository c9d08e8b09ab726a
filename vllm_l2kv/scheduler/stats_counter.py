"""Accumulates compaction statistics between two reports of vLLM's `SchedulerStats`."""

from collections.abc import Iterable

from vllm_l2kv.messages.stats import CompactionEvent, CompactionStats
from vllm_l2kv.policy import Compaction


class StatsCounter:
    """Statistics of an engine since the last report."""

    def __init__(self) -> None:
        self._stats = CompactionStats()

    def compressed(self) -> None:
        """Counts a request's first compaction."""
        self._stats.num_compressed += 1

    def compacted(self, compaction: Compaction, num_taken_blocks: int) -> None:
        """Counts a compaction, and the blocks that it took from the pool."""
        evicted = compaction.num_rows - compaction.num_keep
        self._stats.compactions.append(CompactionEvent(str(compaction.kind), compaction.num_keep, evicted))
        self._stats.num_taken_blocks += num_taken_blocks

    def found(self, num_tokens: int) -> None:
        """Counts prompt tokens whose compacted rows were found in the cache."""
        self._stats.num_found_tokens += num_tokens

    def published(self) -> None:
        """Counts a compacted prefix that was added to the prefix cache."""
        self._stats.num_published += 1

    def freed(self, num_blocks: int) -> None:
        """Counts blocks that were returned to the pool."""
        self._stats.num_freed_blocks += num_blocks

    def preempted(self) -> None:
        """Counts a request that was preempted to free blocks for a compaction."""
        self._stats.num_preempted += 1

    def measured(self, seconds: Iterable[float]) -> None:
        """Adds seconds that compactions took on the device."""
        self._stats.seconds.extend(seconds)

    def take(self) -> CompactionStats:
        """Events since the last call. The caller fills in the number of tokens held."""
        stats, self._stats = self._stats, CompactionStats()
        return stats
