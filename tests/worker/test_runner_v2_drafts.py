"""vLLM's speculators of runner V2 are not affected by compactions, since their layers are in a full group."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_gpu import Builder, HostRunner, order, patch_vllm
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator
from vllm.v1.worker.utils import AttentionGroup

from vllm_l2kv.worker.runner import Step
from vllm_l2kv.worker.runner_v2 import RunnerV2

COMPRESSED, FULL = 0, 1
LENGTHS = [20, 30, 40]
"""Lengths of requests in states 5, 2 and 7 after this step; the one in state 2 has evicted 16 tokens of group 0."""
STATES = [5, 2, 7]
NUM_TOKENS = 4
CPU = torch.device("cpu")
CONFIG = SimpleNamespace(kv_cache_groups=[None, None])


class DraftBuilder(Builder):
    supports_update_block_table = False


def group(group_id: int, *names: str) -> AttentionGroup:
    return AttentionGroup(None, list(names), None, group_id, metadata_builders=[DraftBuilder()])


@pytest.fixture
def drafting(monkeypatch) -> SimpleNamespace:
    """A runner in vLLM's order: the speculator gets the tables, then they are replaced, then a request is compacted."""
    patch_vllm(monkeypatch)
    vllm_runner = HostRunner()
    vllm_runner.attn_groups = [[group(COMPRESSED, "target")], [group(FULL, "target full", "draft")]]
    speculator = object.__new__(StandaloneARSpeculator)
    speculator.block_tables, speculator.kv_cache_config = vllm_runner.block_tables, CONFIG
    speculator.attn_groups = [[], [group(FULL, "draft")]]
    speculator.target_attn_groups = vllm_runner.attn_groups
    speculator.input_buffers = InputBuffers(max_num_reqs=8, max_num_tokens=64, device=CPU)
    speculator.dcp_size, speculator.draft_max_seq_len = 1, 64
    speculator.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=64))
    if not isinstance(getattr(DraftModelSpeculator, "max_model_len", None), property):  # an attribute in 0.32
        speculator.max_model_len = 64
    speculator.draft_is_prefilling = torch.zeros(8, dtype=torch.bool)
    speculator.arange_np = np.arange(9, dtype=np.int32)
    vllm_runner.req_states.req_id_to_index.update(a=5, b=2, c=7)
    for state in STATES:
        vllm_runner.block_tables.append_block_ids(state, ([*range(10, 26)], [*range(30, 38)]), overwrite=True)
    runner = RunnerV2(vllm_runner, [COMPRESSED])
    runner.begin_step(Step(orders=[order("b", 16, destination=(3, 9, 4, 8))]))
    vllm_runner.block_tables.apply_staged_writes()
    return SimpleNamespace(runner=vllm_runner, speculator=speculator)


def target_step(vllm_runner: HostRunner) -> tuple[torch.Tensor, dict]:
    """Returns slots and metadata of a step that verifies three drafts of each request."""
    idx_mapping, starts = torch.tensor(STATES), torch.arange(0, 13, NUM_TOKENS, dtype=torch.int32)
    positions = torch.cat([torch.arange(length - NUM_TOKENS, length) for length in LENGTHS])
    tables = vllm_runner.block_tables.gather_block_tables(idx_mapping, 3)
    slots = vllm_runner.block_tables.compute_slot_mappings(idx_mapping, starts, positions, len(positions))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    metadata = build_attn_metadata(
        vllm_runner.attn_groups, 3, 12, starts, starts, NUM_TOKENS, lengths, 40, tables, slots, CONFIG,
        seq_lens_cpu_upper_bound=lengths + 3, req_idx=np.array(STATES),
    )  # fmt: skip
    return slots.clone(), metadata


def test_the_first_pass_of_a_head_uses_the_targets_metadata(drafting):
    """EAGLE and similar methods draft first with the target's metadata for their own layers."""
    slots, metadata = target_step(drafting.runner)
    assert metadata["draft"] is metadata["target full"]
    assert metadata["draft"].seq_lens.tolist() == LENGTHS
    assert metadata["target"].seq_lens.tolist() == [20, 14, 40]
    assert slots[FULL, 4:8].tolist() == [33 * 8 + 2, 33 * 8 + 3, 33 * 8 + 4, 33 * 8 + 5]
    assert slots[COMPRESSED, 4:8].tolist() == [4 * 4 + 2, 4 * 4 + 3, 8 * 4, 8 * 4 + 1]


def test_the_longest_length_on_the_host_is_a_bound_while_drafts_are_under_way(drafting):
    _, metadata = target_step(drafting.runner)
    assert metadata["target"].max_seq_len == 43


def test_later_drafts_use_positions(drafting):
    """Slots and lengths of each later pass, which the speculator gets from its own tables."""
    target_step(drafting.runner)
    speculator, ahead = drafting.speculator, 1
    buffers = speculator.input_buffers
    positions = torch.tensor(LENGTHS) - 1 + ahead
    buffers.seq_lens[:3] = torch.tensor(LENGTHS) + ahead
    buffers.query_start_loc[:4] = torch.arange(4)
    slots = speculator.block_tables.compute_slot_mappings(
        torch.tensor(STATES), buffers.query_start_loc[:4], positions, 3
    )
    assert slots[FULL].tolist() == [(30 + p // 8) * 8 + p % 8 for p in positions.tolist()]
    metadata = speculator._build_uniform_attn_metadata(
        num_reqs=3,
        batch_desc=BatchExecutionDescriptor(cg_mode=CUDAGraphMode.NONE, num_tokens=3, num_reqs=3),
        num_query_per_req=1,
        seq_lens_cpu_upper_bound=torch.tensor(LENGTHS, dtype=torch.int32),
        step=ahead,
    )
    assert set(metadata) == {"draft"}
    assert metadata["draft"].seq_lens.tolist() == [21, 31, 41]
    assert metadata["draft"].slot_mapping.tolist() == slots[FULL].tolist()
    assert metadata["draft"].block_table_tensor[1, :4].tolist() == [30, 31, 32, 33]


def test_the_next_step_of_the_target_has_its_slots_again(drafting):
    """A pass of drafts writes slots of full groups alone into the same buffer."""
    before, _ = target_step(drafting.runner)
    test_later_drafts_use_positions(drafting)
    assert torch.equal(target_step(drafting.runner)[0], before)


def test_graphs_of_the_first_pass_are_captured_with_the_new_groups(drafting):
    """The speculator keeps the runner's lists, in which the new groups replace vLLM's."""
    assert drafting.speculator.target_attn_groups is drafting.runner.attn_groups
    assert type(drafting.speculator.target_attn_groups[COMPRESSED][0]).__name__ == "PhysicalAttentionGroup"
    assert type(drafting.speculator.target_attn_groups[FULL][0]) is AttentionGroup
