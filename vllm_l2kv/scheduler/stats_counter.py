"""Accumulates compaction statistics between two reports of vLLM's `SchedulerStats`."""

from collections.abc import Iterable

from vllm_l2kv.messages.stats import CompactionStats


class StatsCounter:
    """The stats of an engine, step by step."""

    def __init__(self) -> None:
        self._stats = CompactionStats()
        # Unfinished requests that counted already.
        self._compressed: set[str] = set()
        self._waited: set[str] = set()

    def compacted(self, req_id: str, num_kept: int, num_evicted: int, num_taken_blocks: int) -> None:
        """Counts one compaction."""
        self._stats.num_taken_blocks += num_taken_blocks
        self._waited.discard(req_id)
        if req_id not in self._compressed:
            self._compressed.add(req_id)
            self._stats.kept_tokens.append(num_kept)
            self._stats.evicted_tokens.append(num_evicted)

    def freed(self, num_blocks: int) -> None:
        """Counts blocks that went back to the pool."""
        self._stats.num_freed_blocks += num_blocks

    def waited(self, req_id: str) -> None:
        """Counts a compaction that found no blocks, once however long it waits."""
        if req_id not in self._waited:
            self._waited.add(req_id)
            self._stats.num_waited += 1

    def measured(self, seconds: Iterable[float]) -> None:
        """Notes times on the device."""
        self._stats.seconds.extend(seconds)

    def forget(self, req_id: str) -> None:
        """Drops a request that is finished."""
        self._compressed.discard(req_id)
        self._waited.discard(req_id)

    def take(self, logical_tokens: int, physical_tokens: int) -> CompactionStats:
        """What happened since the last call."""
        stats, self._stats = self._stats, CompactionStats()
        stats.logical_tokens, stats.physical_tokens = logical_tokens, physical_tokens
        return stats
