"""Runner V1 (`gpu_model_runner.GPUModelRunner`), which vLLM uses on CPUs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.block_table import BlockTable

from vllm_l2kv.kv_cache_spec import group_layer_specs
from vllm_l2kv.worker.attention_lengths import make_groups_physical, with_physical_lengths
from vllm_l2kv.worker.runner import Step

BatchCounts = Callable[[], torch.Tensor | None]


class RunnerV1:
    """Gives a runner's compressed groups physical slots and lengths, and applies orders to its state.

    Args:
        runner: vLLM's runner, with its KV cache initialized.
        group_ids: Ids of the compressed KV-cache groups.
    """

    def __init__(self, runner: Any, group_ids: Sequence[int]) -> None:
        self._runner = runner
        self.counts = EvictedCountsV1()
        tables = runner.input_batch.block_table.block_tables
        for group_id in group_ids:
            tables[group_id] = CompressedBlockTable(tables[group_id], self._of_batch)
        make_groups_physical(runner.attn_groups, group_ids, self._make_physical)
        runner._zero_block_ids = self._zero

    def _zero(self, block_ids: Sequence[int]) -> None:
        """Zeroes blocks of attention layers that vLLM hands out; its own method skips groups of packed layouts."""
        layers = self._runner.compilation_config.static_forward_context
        for group in self._runner.kv_cache_config.kv_cache_groups:
            for name, spec in group_layer_specs(group).items():
                if isinstance(spec, AttentionSpec):
                    layers[name].kv_cache[list(block_ids)] = 0

    def begin_step(self, step: Step) -> None:
        """Forgets requests, gives compacted ones the blocks of their kept rows, and updates all counts.

        Changes both the request's state and its row in the batch, if it has one: a request that skips a step leaves the
        batch, and is later added again from its state.
        """
        self.counts.forget(step.gone)
        batch = self._runner.input_batch
        for order in step.orders:
            row = batch.req_id_to_index.get(order.req_id)
            for move in order.moves:
                self._runner.requests[order.req_id].block_ids[move.group_id][:] = move.destination
                if row is not None:
                    batch.block_table[move.group_id].add_row(list(move.destination), row)
            self.counts.set(order.req_id, order.num_evicted)
        for req_id, num_evicted in step.hits.items():
            self.counts.set(req_id, num_evicted)

    def _of_batch(self) -> torch.Tensor | None:
        return self.counts.of_batch(self._runner.input_batch.req_ids)

    def _make_physical(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        counts = self._of_batch()
        return metadata if counts is None else subtract_evicted(metadata, counts)


class EvictedCountsV1:
    """Evicted tokens of each compacted request, on the host; other requests are absent."""

    def __init__(self) -> None:
        self._num_evicted: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._num_evicted)

    def by_request(self) -> dict[str, int]:
        """Request ids to evicted tokens, for tests that compare ranks."""
        return dict(self._num_evicted)

    def set(self, req_id: str, num_evicted: int) -> None:
        """Sets the count of a compacted request."""
        self._num_evicted[req_id] = num_evicted

    def forget(self, req_ids: Iterable[str]) -> None:
        """Forgets requests, compacted or not."""
        for req_id in req_ids:
            self._num_evicted.pop(req_id, None)

    def of_batch(self, req_ids: Sequence[str]) -> torch.Tensor | None:
        """Counts in batch order.

        Args:
            req_ids: Request ids of the batch.

        Returns:
            `[len(req_ids)]` int32 on the CPU, or `None` if no request is compacted.
        """
        if not self._num_evicted:
            return None
        counts = [self._num_evicted.get(req_id, 0) for req_id in req_ids]
        return torch.tensor(counts, dtype=torch.int32) if any(counts) else None


class CompressedBlockTable:
    """Wraps one group's `BlockTable` and computes slots as `position - num_evicted`.

    All other calls go to the table itself.
    """

    def __init__(self, table: BlockTable, of_batch: BatchCounts) -> None:
        self._table = table
        self._of_batch = of_batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def compute_slot_mapping(self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor) -> None:
        """Same contract as upstream, with physical slots.

        Args:
            num_reqs: Requests in the batch.
            query_start_loc: `[num_reqs + 1]` int32, where each request's tokens begin.
            positions: `[num_tokens]` int64.
        """
        counts = self._of_batch()
        if counts is not None:
            num_tokens_of = query_start_loc[1 : num_reqs + 1] - query_start_loc[:num_reqs]
            positions = positions - torch.repeat_interleave(counts[:num_reqs], num_tokens_of)
        self._table.compute_slot_mapping(num_reqs, query_start_loc, positions)


def subtract_evicted(metadata: CommonAttentionMetadata, counts: torch.Tensor) -> CommonAttentionMetadata:
    """A copy of the metadata with physical lengths; vLLM's own tensors are not changed.

    Args:
        metadata: Metadata of a batch, possibly padded.
        counts: `[num_reqs]` int32, evicted tokens in batch order.
    """
    seq_lens = metadata.seq_lens.clone()
    seq_lens[: counts.shape[0]] -= counts
    return with_physical_lengths(metadata, seq_lens, counts)
