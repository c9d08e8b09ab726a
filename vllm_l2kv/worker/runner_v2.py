"""Runner V2 (`gpu.model_runner.GPUModelRunner`), vLLM's default on GPUs.

Its block tables are on the device and CUDA graphs read its metadata, so kernels write slots and lengths to buffers at
fixed addresses. Nothing here waits for the device, and only models with recurrent layers loop over a batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

from vllm_l2kv.kernels.slots import physical_lengths, slot_mappings
from vllm_l2kv.worker.attention_lengths import make_groups_physical, with_physical_lengths
from vllm_l2kv.worker.runner import NOTHING, Step


class RunnerV2:
    """Gives a runner's compressed groups physical slots and lengths, and applies orders to its state.

    Args:
        runner: vLLM's runner, with its KV cache initialized and no CUDA graph captured yet.
        group_ids: Ids of the compressed KV-cache groups.
    """

    def __init__(self, runner: Any, group_ids: Sequence[int]) -> None:
        self._runner = runner
        self.counts = EvictedCountsV2(runner.max_num_reqs)
        self._tables = CompressedBlockTables(runner.block_tables, group_ids, self.counts, runner.req_states)
        self._seq_lens = torch.zeros(runner.max_num_reqs, dtype=torch.int32, device=runner.device)
        self._num_scheduled = NOTHING
        self._made: tuple[CommonAttentionMetadata, CommonAttentionMetadata] | None = None
        runner.block_tables = self._tables
        make_groups_physical(runner.attn_groups, group_ids, self._make_physical)

    def begin_step(self, step: Step) -> None:
        """Forgets requests and stages the block tables of compacted ones, which vLLM copies together with its own.

        A request that begins gets its state from vLLM later in the step, so `CompressedBlockTables` sets its count.
        """
        self.counts.forget(step.gone)
        for order in step.orders:
            state = self._runner.req_states.req_id_to_index[order.req_id]
            for move in order.moves:
                self._tables.block_tables[move.group_id].stage_write(state, 0, list(move.destination))
                self._tables.num_blocks.np[move.group_id, state] = len(move.destination)
            self.counts.set(order.req_id, state, order.num_evicted)
        self._tables.hits = step.hits
        self._num_scheduled = step.num_scheduled

    def warm_up(self) -> None:
        """Compiles the kernels for the argument types that the runner uses, on an empty batch."""
        idx_mapping = torch.full((1,), -1, dtype=torch.int64, device=self._seq_lens.device)
        starts = torch.zeros(2, dtype=torch.int32, device=self._seq_lens.device)
        positions = torch.zeros(1, dtype=torch.int64, device=self._seq_lens.device)
        self._tables.compressed_slot_mappings(self._tables.slot_mappings, idx_mapping, starts, positions)
        physical_lengths(self._seq_lens[:1], starts[:1], idx_mapping, self.counts.on_device)

    def _make_physical(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """Physical metadata, made once for all builders of a step, to which vLLM passes the same object."""
        if self._made is None or self._made[0] is not metadata:
            self._made = metadata, self._physical(metadata)
        return self._made[1]

    def _physical(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """Writes to the same buffer at capture and at replay."""
        seq_lens = self._seq_lens[: metadata.seq_lens.shape[0]]
        idx_mapping = self._tables.idx_mapping
        if idx_mapping is None or not len(self.counts):
            seq_lens.copy_(metadata.seq_lens)
            return metadata.replace(seq_lens=seq_lens)
        physical_lengths(seq_lens, metadata.seq_lens, idx_mapping, self.counts.on_device)
        states = self._states_of_batch() if metadata.req_idx is None else metadata.req_idx
        return with_physical_lengths(metadata, seq_lens, self.counts.of_states(states))

    def _states_of_batch(self) -> np.ndarray:
        """Request states in batch order, which vLLM does not pass on for models with recurrent layers.

        Their batches have no drafts.
        """
        req_ids = sort_batch_req_ids(self._num_scheduled, {}, self._runner.decode_query_len)
        return np.array([self._runner.req_states.req_id_to_index[req_id] for req_id in req_ids], dtype=np.intp)


class EvictedCountsV2:
    """Evicted tokens of each compacted request, indexed by the runner's request state.

    Kernels read the counts from host memory when their step runs. vLLM keeps as many copies as steps can be in flight
    and reuses a copy after that many publications. So counts may be published once per step: a second publication
    would overwrite counts that a step in flight has yet to read.
    """

    def __init__(self, max_num_reqs: int) -> None:
        self._counts = UvaBackedTensor(max_num_reqs, dtype=torch.int32)
        self._state_of: dict[str, int] = {}
        self._is_published = True

    def __len__(self) -> int:
        return len(self._state_of)

    def by_request(self) -> dict[str, int]:
        """Request ids to evicted tokens, for tests that compare ranks."""
        return {req_id: int(self._counts.np[state]) for req_id, state in self._state_of.items()}

    @property
    def on_device(self) -> torch.Tensor:
        """The counts as last published: `[max_num_reqs]` int32, 0 where nothing was evicted."""
        return self._counts.gpu

    def of_states(self, states: np.ndarray) -> torch.Tensor:
        """Counts of these request states, unpublished changes included: `[num_reqs]` int32 on the host."""
        return torch.from_numpy(self._counts.np[states])

    def set(self, req_id: str, state: int, num_evicted: int) -> None:
        """Sets the count of a compacted request; `publish` makes it visible to kernels."""
        self._state_of[req_id] = state
        self._counts.np[state] = num_evicted
        self._is_published = False

    def forget(self, req_ids: Iterable[str]) -> None:
        """Forgets requests, compacted or not; `publish` makes it visible to kernels."""
        for req_id in req_ids:
            state = self._state_of.pop(req_id, None)
            if state is not None:
                self._counts.np[state] = 0
                self._is_published = False

    def publish(self) -> None:
        """Makes changed counts visible to kernels that are launched from now on. At most once per step."""
        if not self._is_published:
            self._counts.copy_to_uva()
            self._is_published = True


class CompressedBlockTables:
    """Wraps the runner's `BlockTables` and computes slots of compressed groups as `position - num_evicted`.

    Attributes:
        idx_mapping: `[num_reqs]` int64, request states of the current batch; `None` for a dummy batch.
        hits: Ids of requests that begin on compacted rows in this step, with their evicted tokens.
    """

    def __init__(self, tables: BlockTables, group_ids: Iterable[int], counts: EvictedCountsV2, req_states: Any) -> None:
        self._tables = tables
        self._counts = counts
        self._req_states = req_states
        self.hits: Mapping[str, int] = {}
        self.idx_mapping: torch.Tensor | None = None
        is_compressed = [int(group_id in set(group_ids)) for group_id in range(tables.num_kv_cache_groups)]
        self._is_compressed = torch.tensor(is_compressed, dtype=torch.int32, device=tables.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tables, name)

    def apply_staged_writes(self) -> None:
        """Same contract as upstream, called once per step when every request has its state; publishes the counts."""
        for req_id, num_evicted in self.hits.items():
            self._counts.set(req_id, self._req_states.req_id_to_index[req_id], num_evicted)
        self.hits = {}
        self._counts.publish()
        self._tables.apply_staged_writes()

    def compute_slot_mappings(
        self,
        idx_mapping: torch.Tensor,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        num_tokens_padded: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Same contract as upstream, in one launch; slots of compressed groups are `position - num_evicted`."""
        self.idx_mapping = idx_mapping
        tables = self._tables
        if not len(self._counts):
            return tables.compute_slot_mappings(idx_mapping, query_start_loc, positions, num_tokens_padded, out)
        mappings: torch.Tensor = tables.slot_mappings if out is None else out
        self.compressed_slot_mappings(mappings, idx_mapping, query_start_loc, positions)
        return mappings[:, :num_tokens_padded]

    def compressed_slot_mappings(
        self, out: torch.Tensor, idx_mapping: torch.Tensor, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Launches `kernels.slots.slot_mappings`, which documents the shapes."""
        slot_mappings(
            out,
            idx_mapping,
            query_start_loc,
            positions,
            self._counts.on_device,
            self._is_compressed,
            self._tables.block_table_ptrs,
            self._tables.block_table_strides,
            self._tables.block_sizes_tensor,
            self._tables.slot_mapping_enabled,
        )

    def get_dummy_block_tables(self, num_reqs: int) -> tuple[torch.Tensor, ...]:
        """Same contract as upstream; a dummy batch has no request states."""
        self.idx_mapping = None
        return self._tables.get_dummy_block_tables(num_reqs)
