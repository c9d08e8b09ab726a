"""Accumulates compaction statistics between two reports of vLLM's `SchedulerStats`."""

from collections.abc import Iterable

from vllm_l2kv.messages.stats import CompactionStats
from vllm_l2kv.scheduler.request_state import RequestState


class StatsCounter:
    """Statistics of an engine since the last report."""

    def __init__(self) -> None:
        self._stats = CompactionStats()

    def compacted(self, state: RequestState, num_kept: int, num_evicted: int, num_taken_blocks: int) -> None:
        """Counts one compaction; a request that is compacted once more is counted once."""
        self._stats.num_taken_blocks += num_taken_blocks
        state.is_waiting = False
        if not state.is_counted:
            state.is_counted = True
            self._stats.kept_tokens.append(num_kept)
            self._stats.evicted_tokens.append(num_evicted)

    def freed(self, num_blocks: int) -> None:
        """Counts blocks that went back to the pool."""
        self._stats.num_freed_blocks += num_blocks

    def waited(self, state: RequestState) -> None:
        """Counts a compaction that found no blocks, once however long it waits."""
        if not state.is_waiting:
            state.is_waiting = True
            self._stats.num_waited += 1

    def measured(self, seconds: Iterable[float]) -> None:
        """Adds times on the device."""
        self._stats.seconds.extend(seconds)

    def take(self, logical_tokens: int, physical_tokens: int) -> CompactionStats:
        """The statistics since the last call."""
        stats, self._stats = self._stats, CompactionStats()
        stats.logical_tokens, stats.physical_tokens = logical_tokens, physical_tokens
        return stats
