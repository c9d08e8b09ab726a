"""From positions to slots: `slot = position - num_evicted`.

Only the block tables and attention lengths of compressed groups become physical. RoPE, sampling and vLLM's own
`seq_lens` keep logical positions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.utils import AttentionGroup


class EvictedCounts:
    """Slots by which each compacted request's positions moved forward; requests not compacted are absent."""

    def __init__(self) -> None:
        self._num_evicted: dict[str, int] = {}

    def set(self, req_id: str, num_evicted: int) -> None:
        """Notes a compaction."""
        self._num_evicted[req_id] = num_evicted

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drops requests that finished, were aborted or preempted."""
        for req_id in req_ids:
            self._num_evicted.pop(req_id, None)

    def of_batch(self, req_ids: Sequence[str]) -> torch.Tensor | None:
        """Counts in batch order.

        Args:
            req_ids: The batch's requests.

        Returns:
            `[len(req_ids)]` int32 on the CPU, or `None` if none of them is compacted.
        """
        if not self._num_evicted:
            return None
        counts = [self._num_evicted.get(req_id, 0) for req_id in req_ids]
        return torch.tensor(counts, dtype=torch.int32) if any(counts) else None


class CompressedBlockTable:
    """Stands before one group's `BlockTable` in runner V1 and gives it slots for positions.

    Everything else goes to the table itself.
    """

    def __init__(self, table: BlockTable, batch_counts: Callable[[], torch.Tensor | None]) -> None:
        self._table = table
        self._batch_counts = batch_counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def compute_slot_mapping(self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor) -> None:
        """As vLLM's, for `position - num_evicted`.

        Args:
            num_reqs: Requests in the batch.
            query_start_loc: `[num_reqs + 1]` int32, where each request's tokens begin.
            positions: `[num_tokens]` int64.
        """
        counts = self._batch_counts()
        if counts is not None:
            num_tokens_of = query_start_loc[1 : num_reqs + 1] - query_start_loc[:num_reqs]
            positions = positions - torch.repeat_interleave(counts[:num_reqs], num_tokens_of)
        self._table.compute_slot_mapping(num_reqs, query_start_loc, positions)


@dataclass(eq=False)
class CompressedAttentionGroup(AttentionGroup):
    """An attention group whose metadata carries physical lengths: what the cache holds, not what was computed."""

    batch_counts: Callable[[], torch.Tensor | None] = lambda: None

    @classmethod
    def of(cls, group: AttentionGroup, batch_counts: Callable[[], torch.Tensor | None]) -> Self:
        """The same group, with physical lengths."""
        state = {field.name: getattr(group, field.name) for field in fields(AttentionGroup)}
        return cls(**state, batch_counts=batch_counts)

    def build_metadata(self, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, of physical lengths."""
        return super().build_metadata(self._with_physical_lengths(common_attn_metadata), *args, **kwargs)

    def _with_physical_lengths(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        counts = self.batch_counts()
        if counts is None:
            return metadata
        seq_lens = metadata.seq_lens.clone()
        seq_lens[: counts.shape[0]] -= counts
        changes: dict[str, Any] = {"seq_lens": seq_lens, "max_seq_len": int(seq_lens.max())}
        if metadata.seq_lens_cpu_upper_bound is not None:
            upper_bound = metadata.seq_lens_cpu_upper_bound.clone()
            upper_bound[: counts.shape[0]] -= counts
            changes["seq_lens_cpu_upper_bound"] = upper_bound
        return metadata.replace(**changes)
