"""Runner V2 and the GPU worker without a GPU: vLLM's request states, block tables and ring of buffers, on the host.

`HostRunner` has the parts of vLLM's runner that `RunnerV2` uses: vLLM's own methods keep the states and the tables.
Kernels are plain loops; those of vllm-l2kv can also run in Triton's interpreter.
"""

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.utils import AttentionGroup
from vllm.v1.worker.worker_base import WorkerBase

from vllm_l2kv.kernels.slots import PAD_SLOT
from vllm_l2kv.messages.orders import CompactionOrder, GroupMove, attach_compacted_hits, attach_orders
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.worker import runner_v2
from vllm_l2kv.worker.clock import HostClock
from vllm_l2kv.worker.runner_v2 import RunnerV2
from vllm_l2kv.worker.worker import CompactionWorker

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def patch_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves vLLM's ring of buffers and its staged writes into host memory, and replaces kernels by loops."""
    from vllm.v1.worker.cpu.buffer_utils import UvaBuffer  # the one of vLLM's own CPU worker

    monkeypatch.setattr(buffer_utils, "UvaBuffer", UvaBuffer)
    monkeypatch.setattr(buffer_utils.StagedWriteTensor, "apply_write", apply_write)
    monkeypatch.setattr(buffer_utils.FusedStagedWriter, "apply", apply_writes)
    if not INTERPRETED:
        monkeypatch.setattr(runner_v2, "slot_mappings", slot_mappings)
        monkeypatch.setattr(runner_v2, "physical_lengths", physical_lengths)


# --- kernels


def apply_write(tensor: buffer_utils.StagedWriteTensor) -> None:
    begin = 0
    for row, start, end in zip(
        tensor._staged_write_indices, tensor._staged_write_starts, tensor._staged_write_cu_lens, strict=True
    ):
        content = tensor._staged_write_contents[begin:end]
        target = tensor.gpu if tensor.gpu.dim() == 1 else tensor.gpu[row]
        first = row if tensor.gpu.dim() == 1 else start
        target[first : first + len(content)] = torch.tensor(content, dtype=tensor.dtype)
        begin = end
    tensor.clear_staged_writes()


def apply_writes(writer, tensors, *where) -> None:
    for tensor in tensors:
        apply_write(tensor)


def slot_mappings(
    out, idx_mapping, query_start_loc, positions, num_evicted, is_compressed, pointers, strides, block_sizes, has_slots
) -> None:
    """Does in loops what `kernels.slots.slot_mappings` does."""
    out.fill_(PAD_SLOT)
    for group in range(out.shape[0]):
        for i, state in enumerate(idx_mapping.tolist()):
            tokens = slice(int(query_start_loc[i]), int(query_start_loc[i + 1]))
            if state < 0 or not has_slots[group]:
                continue
            size, stride = int(block_sizes[group]), int(strides[group])
            table = (ctypes.c_int32 * stride).from_address(int(pointers[group]) + 4 * state * stride)
            slots = positions[tokens] - int(num_evicted[state]) * int(is_compressed[group])
            out[group, tokens] = torch.tensor([table[slot // size] * size + slot % size for slot in slots.tolist()])


def physical_lengths(out, seq_lens, idx_mapping, num_evicted) -> None:
    """Does in loops what `kernels.slots.physical_lengths` does."""
    out.copy_(seq_lens)
    for i, state in enumerate(idx_mapping.tolist()):
        if state >= 0:
            out[i] -= int(num_evicted[state])


class HostTables(BlockTables):
    """vLLM's block tables, read by loops."""

    def gather_block_tables(self, idx_mapping, num_reqs_padded, out=None, out_ptrs=None):
        for group, table in enumerate(self.input_block_tables):
            table[:num_reqs_padded] = 0
            for i, state in enumerate(idx_mapping.tolist()):
                num_blocks = int(self.num_blocks.gpu[group, state])
                table[i, :num_blocks] = self.block_tables[group].gpu[state, :num_blocks]
        return tuple(table[:num_reqs_padded] for table in self.input_block_tables)

    def compute_slot_mappings(self, idx_mapping, query_start_loc, positions, num_tokens_padded, out=None):
        out = self.slot_mappings if out is None else out
        nothing = torch.zeros(self.max_num_reqs, dtype=torch.int32)
        slot_mappings(
            out, idx_mapping, query_start_loc, positions, nothing, nothing,
            self.block_table_ptrs, self.block_table_strides, self.block_sizes_tensor, self.slot_mapping_enabled,
        )  # fmt: skip
        return out[:, :num_tokens_padded]


# --- vLLM's runner


class Builder:
    """A metadata builder that keeps its arguments."""

    def build(self, common_prefix_len, common_attn_metadata):
        return common_attn_metadata

    def build_for_cudagraph_capture(self, common_attn_metadata):
        return common_attn_metadata


@dataclass
class Seen:
    """Arguments of the kernels of a step.

    Attributes:
        slots: By request, `[num_groups, num_tokens]`.
        tables: By group, `[num_reqs, max_num_blocks]`.
        metadata: By group.
        req_ids: In batch order.
    """

    slots: dict[str, torch.Tensor]
    tables: tuple[torch.Tensor, ...]
    metadata: list[CommonAttentionMetadata]
    req_ids: list[str]


class HostRunner:
    """States and tables of vLLM's runner V2, without a model.

    Args:
        block_sizes: Tokens in a block, by group.
        max_num_reqs: Number of request states.
        max_model_len: Tokens of the longest request.
        max_num_tokens: Maximum number of tokens in a step.
        device: Where tensors are; loops run on CPUs only.
    """

    def __init__(
        self,
        block_sizes: Sequence[int] = (4, 8),
        max_num_reqs: int = 8,
        max_model_len: int = 64,
        max_num_tokens: int = 64,
        device: torch.device = CPU,
    ) -> None:
        self.max_num_reqs = max_num_reqs
        self.max_num_tokens = max_num_tokens
        self.device = device
        num_blocks = [-(-max_model_len // size) for size in block_sizes]
        tables = HostTables if device == CPU else BlockTables
        self.block_tables: Any = tables(list(block_sizes), max_num_reqs, max_num_tokens, num_blocks, device)
        self.attn_groups = [
            [AttentionGroup(None, [], None, group, metadata_builders=[Builder()])] for group in range(len(block_sizes))
        ]
        self.req_states = SimpleNamespace(req_id_to_index={})
        self.decode_query_len = 1

    def dummy_metadata(self, num_reqs: int, seq_len: int, capture: bool) -> list[CommonAttentionMetadata]:
        """Returns attention's inputs of a dummy batch, as during the capture of a graph."""
        self.block_tables.get_dummy_block_tables(num_reqs)
        self.block_tables.get_dummy_slot_mappings(num_reqs)
        return self.build(torch.full((num_reqs,), seq_len, dtype=torch.int32), capture)

    def build(
        self, seq_lens: torch.Tensor, capture: bool = False, states: Sequence[int] | None = ()
    ) -> list[CommonAttentionMetadata]:
        """Returns attention's inputs by group.

        Args:
            seq_lens: `[num_reqs]` int32.
            capture: Whether a graph is being captured.
            states: The requests' states; `None` for a model with recurrent layers, for which vLLM does not tell them.
        """
        num_reqs = seq_lens.shape[0]
        metadata = CommonAttentionMetadata(
            query_start_loc=torch.arange(num_reqs + 1, dtype=torch.int32),
            query_start_loc_cpu=torch.arange(num_reqs + 1, dtype=torch.int32),
            seq_lens=seq_lens,
            num_reqs=num_reqs,
            num_actual_tokens=num_reqs,
            max_query_len=1,
            max_seq_len=int(seq_lens.max()),
            seq_lens_cpu_upper_bound=seq_lens.cpu(),
            req_idx=None if states is None else np.array(states, dtype=np.int32),
            block_table_tensor=torch.zeros(num_reqs, 1, dtype=torch.int32),
            slot_mapping=torch.zeros(num_reqs, dtype=torch.int64),
        )
        build = "build_metadata_for_cudagraph_capture" if capture else "build_metadata"
        return [getattr(group, build)(metadata) for (group,) in self.attn_groups]


class StatefulRunner(HostRunner):
    """Also has vLLM's request states, so that it executes a scheduler's output.

    Attributes:
    num_computed: Computed tokens of each request, which the host does not know while drafts are in flight.
    """

    def __init__(self, **sizes: Any) -> None:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        from vllm.v1.worker.gpu.states import RequestState

        super().__init__(**sizes)
        self._vllm = GPUModelRunner
        max_model_len = sizes.get("max_model_len", 64)
        self.req_states = RequestState(self.max_num_reqs, max_model_len, self.max_num_tokens, 0, 1000, self.device)
        nothing = SimpleNamespace(
            add_request=lambda *_: None, remove_request=lambda *_: None, apply_staged_writes=lambda: None
        )
        self.model_state = self.lora_state = nothing
        self.num_computed: dict[str, int] = {}
        self.is_last_pp_rank = False
        self.kv_caches: list[torch.Tensor] = []
        self.kv_cache_config = SimpleNamespace(num_blocks=1)
        self.sampler = self.encoder_cache = self.pooling_runner = self.pp_handler = None
        self.prompt_logprobs_worker = self.adaptive_verification = None
        self.kv_block_zeroer = SimpleNamespace(zero_block_ids=lambda _: None)

    def _remove_request(self, req_id: str) -> bool:
        return self._vllm._remove_request(self, req_id)

    def execute(self, output: Any) -> Seen | None:
        """Does what `GPUModelRunner.execute_model` does before it launches the model."""
        self._vllm.finish_requests(self, output)
        self._vllm.add_requests(self, output)
        self._vllm.update_requests(self, output)
        self.block_tables.apply_staged_writes()
        if not output.num_scheduled_tokens:
            return None
        req_ids = sorted(output.num_scheduled_tokens, key=lambda req_id: (output.num_scheduled_tokens[req_id], req_id))
        states = [self.req_states.req_id_to_index[req_id] for req_id in req_ids]
        lengths = [output.num_scheduled_tokens[req_id] for req_id in req_ids]
        bounds = self.req_states.num_computed_tokens_np[states]
        begins = np.array([self.num_computed.get(req_id, bound) for req_id, bound in zip(req_ids, bounds, strict=True)])
        assert (begins <= bounds).all(), "what the host counts is a bound"
        positions = torch.from_numpy(np.concatenate([b + np.arange(n) for b, n in zip(begins, lengths, strict=True)]))
        starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        idx_mapping = torch.tensor(states)
        tables = self.block_tables.gather_block_tables(idx_mapping, len(req_ids))
        slots = self.block_tables.compute_slot_mappings(idx_mapping, starts, positions, len(positions))
        of_request = dict(zip(req_ids, slots.split(lengths, dim=1), strict=True))
        seq_lens = torch.from_numpy(begins + np.array(lengths)).to(torch.int32)
        return Seen(of_request, tables, self.build(seq_lens, states=states), req_ids)


# --- the worker


class Device(WorkerBase):
    """Takes the place of vLLM's worker: launches a step's kernels and does not wait for them.

    Attributes:
    in_flight: For each step whose kernels have not run yet, the counts that they will read, and the right ones.
    seen: Arguments of the last step's kernels, if the runner has states.
    """

    def __init__(self, runner: Any, num_in_flight: int) -> None:
        self.model_runner = runner
        self.in_flight: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=num_in_flight)
        self.seen: Seen | None = None

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        pass

    def execute_model(self, scheduler_output: Any) -> None:
        if isinstance(self.model_runner, StatefulRunner):
            self.seen = self.model_runner.execute(scheduler_output)
        else:
            states = self.model_runner.req_states.req_id_to_index
            for req_id in (*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())):
                states.pop(req_id, None)
            states.update(scheduler_output.new)
            self.model_runner.block_tables.apply_staged_writes()
        on_device = self._runner.counts.on_device
        self.in_flight.append((on_device, on_device.clone()))

    def check_in_flight(self) -> None:
        """Checks that the host has changed nothing that a step in flight will still read."""
        for found, at_launch in self.in_flight:
            assert torch.equal(found, at_launch), "a later step changed what a step under way has still to read"


class FakeGPUWorker(CompactionWorker, Device):
    """The GPU worker of vllm-l2kv over `Device`, without compactors."""

    def __init__(self, runner: Any, compressed: Sequence[int] = (0,), num_in_flight: int = 2) -> None:
        Device.__init__(self, runner, num_in_flight)
        self.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
        self._compressed = tuple(compressed)
        self.initialize_from_config(KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=[]))

    def _make_compactors(self, layers):
        return []

    def _wait_for_device(self):
        """Nothing is in flight."""

    def _make_clock(self):
        return HostClock()

    def _adapt_runner(self, group_ids):
        return RunnerV2(self.model_runner, self._compressed)


# --- steps


def step_output(finished=(), preempted=(), orders=(), new=(), hits=(), scheduled=()) -> SimpleNamespace:
    """Returns the parts of a `SchedulerOutput` that the worker reads; `new` pairs ids with states."""
    output = SimpleNamespace(
        finished_req_ids=set(finished),
        preempted_req_ids=set(preempted) or None,
        new=new,
        kv_connector_metadata=None,
        num_scheduled_tokens=dict(scheduled),
    )
    if orders:
        attach_orders(output, tuple(orders))
    if hits:
        attach_compacted_hits(output, hits)
    return output


def order(req_id: str, num_evicted: int, destination: tuple[int, ...] = (1,)) -> CompactionOrder:
    """Returns an order for the first group."""
    move = GroupMove(0, (5, 6, 7), destination)
    counts = {"num_rows": num_evicted + 1, "num_keep": 1, "num_evicted": num_evicted}
    return CompactionOrder(req_id=req_id, params=CompressionParams(), moves=(move,), **counts)
