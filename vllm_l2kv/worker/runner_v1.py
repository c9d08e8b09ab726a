"""Runner V1 (`gpu_model_runner.GPUModelRunner`), which vLLM uses on CPUs: where its tables are and how a row changes.

A second runner needs the same two methods and nothing else of the worker.
"""

from collections.abc import Iterable
from typing import Any

import torch

from vllm_l2kv.messages import GroupMove
from vllm_l2kv.worker.slots import CompressedAttentionGroup, CompressedBlockTable, EvictedCounts


class RunnerV1:
    """Makes a runner's compressed groups physical and rewrites their block-table rows.

    Args:
        runner: vLLM's runner, its KV cache initialised.
        group_ids: Compressed KV-cache groups.
        counts: Shared with the worker, which keeps it up to date.
    """

    def __init__(self, runner: Any, group_ids: Iterable[int], counts: EvictedCounts) -> None:
        self._runner = runner
        self._counts = counts
        tables = runner.input_batch.block_table.block_tables
        for group_id in group_ids:
            tables[group_id] = CompressedBlockTable(tables[group_id], self._batch_counts)
            runner.attn_groups[group_id] = [
                CompressedAttentionGroup.of(group, self._batch_counts) for group in runner.attn_groups[group_id]
            ]

    def rewrite_row(self, req_id: str, move: GroupMove) -> None:
        """Points a request at the blocks of its kept rows.

        Both the request's state and, if it is in the batch, its row: a request that sits out a step leaves the batch
        and comes back by its state.
        """
        self._runner.requests[req_id].block_ids[move.group_id][:] = move.destination
        row = self._runner.input_batch.req_id_to_index.get(req_id)
        if row is not None:
            self._runner.input_batch.block_table[move.group_id].add_row(list(move.destination), row)

    def _batch_counts(self) -> torch.Tensor | None:
        return self._counts.of_batch(self._runner.input_batch.req_ids)
