"""Accumulates compaction statistics between two reports of vLLM's `SchedulerStats`."""

from collections.abc import Iterable

from vllm_l2kv.messages.stats import CompactionStats


class StatsCounter:
    """Statistics of an engine since the last report."""

    def __init__(self) -> None:
        self._stats = CompactionStats()

    def compressed(self, num_kept: int, num_evicted: int) -> None:
        """Counts a request's first compaction, and the tokens of its prompt."""
        self._stats.kept_tokens.append(num_kept)
        self._stats.evicted_tokens.append(num_evicted)

    def took(self, num_blocks: int) -> None:
        """Counts blocks of the pool that a compaction took."""
        self._stats.num_taken_blocks += num_blocks

    def freed(self, num_blocks: int) -> None:
        """Counts blocks that went back to the pool."""
        self._stats.num_freed_blocks += num_blocks

    def preempted(self) -> None:
        """Counts a request that was preempted so that a compaction finds blocks."""
        self._stats.num_preempted += 1

    def measured(self, seconds: Iterable[float]) -> None:
        """Adds times on the device."""
        self._stats.seconds.extend(seconds)

    def take(self) -> CompactionStats:
        """What happened since the last call; how many tokens are held is not among it."""
        stats, self._stats = self._stats, CompactionStats()
        return stats
