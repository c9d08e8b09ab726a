"""What the project relies on in vLLM's runner V2 and GPU worker, checked without a GPU."""

import inspect
from dataclasses import fields

import pytest
import torch
from fake_gpu import patch_vllm
from vllm.config import VllmConfig
from vllm.config.cache import CacheConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor, UvaBackedTensor, UvaBufferPool
from vllm.v1.worker.gpu.model_runner import GPUModelRunner, sort_batch_req_ids
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import AttentionGroup

from vllm_l2kv.worker.attention_lengths import PhysicalAttentionGroup
from vllm_l2kv.worker.runner_v2 import CompressedBlockTables


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def in_order(function, *parts: str) -> bool:
    """Whether a function's source has all of these, in this order."""
    source, place = inspect.getsource(function), 0
    for part in parts:
        place = source.find(part, place) + 1
        if not place:
            return False
    return True


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (BlockTables.append_block_ids, ["self", "req_index", "new_block_ids", "overwrite"]),
        (StagedWriteTensor.stage_write, ["self", "index", "start", "x"]),
        (UvaBackedTensor.__init__, ["self", "size", "dtype", "max_concurrency"]),
        (UvaBackedTensor.copy_to_uva, ["self", "n"]),
        (Worker.get_kv_cache_spec, ["self"]),
        (Worker.get_supported_kv_cache_layouts, ["self"]),
        (Worker.determine_available_memory, ["self"]),
        (Worker.initialize_from_config, ["self", "kv_cache_config"]),
        (Worker.execute_model, ["self", "scheduler_output"]),
        (Worker.sample_tokens, ["self", "grammar_output"]),
        (CommonAttentionMetadata.replace, ["self", "kwargs"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_parameters(function, expected):
    assert parameters(function) == expected


@pytest.mark.parametrize("name", ["compute_slot_mappings", "get_dummy_block_tables"])
def test_compressed_tables_are_called_as_vllms(name):
    assert parameters(getattr(CompressedBlockTables, name)) == parameters(getattr(BlockTables, name))


@pytest.mark.parametrize("name", ["build_metadata", "build_metadata_for_cudagraph_capture"])
def test_physical_groups_are_called_as_vllms(name):
    assert parameters(getattr(AttentionGroup, name))[:2] == ["self", "common_attn_metadata"]
    assert parameters(getattr(PhysicalAttentionGroup, name))[:2] == ["self", "common_attn_metadata"]
    assert f"attn_group.{name}(" in inspect.getsource(build_attn_metadata)


def test_what_tables_have(monkeypatch):
    """The kernel `kernels.slots.slot_mappings` reads them in these types and shapes."""
    patch_vllm(monkeypatch)
    tables = BlockTables([4, 8], 6, 64, [16, 8], torch.device("cpu"))
    assert tables.num_kv_cache_groups == 2
    assert (tables.slot_mappings.shape, tables.slot_mappings.dtype) == ((2, 64), torch.int64)
    assert [(table.gpu.shape, table.gpu.dtype) for table in tables.block_tables] == [
        ((6, 16), torch.int32),
        ((6, 8), torch.int32),
    ]
    assert tables.block_table_ptrs.tolist() == [table.gpu.data_ptr() for table in tables.block_tables]
    assert tables.block_table_ptrs.dtype == torch.uint64
    assert tables.block_table_strides.tolist() == [16, 8]
    assert tables.block_table_strides.dtype == torch.int64
    assert tables.block_sizes_tensor.tolist() == [4, 8]
    assert tables.block_sizes_tensor.dtype == torch.int32
    assert tables.num_blocks.np.shape == (2, 6)
    assert tables.device == torch.device("cpu")


def test_a_row_is_appended_to_at_its_number_of_blocks(monkeypatch):
    """`RunnerV2.begin_step` writes both, and vLLM copies them to the device with its own rows."""
    patch_vllm(monkeypatch)
    tables = BlockTables([4], 6, 64, [16], torch.device("cpu"))
    tables.append_block_ids(3, ([5, 6, 7],), overwrite=True)
    tables.block_tables[0].stage_write(3, 0, [9])
    tables.num_blocks.np[0, 3] = 1
    tables.append_block_ids(3, ([8],), overwrite=False)
    tables.apply_staged_writes()
    assert tables.block_tables[0].gpu[3, :3].tolist() == [9, 8, 7]
    assert tables.num_blocks.gpu[0].tolist() == [0, 0, 0, 2, 0, 0]


def test_buffers_are_used_in_turn(monkeypatch):
    """There are as many buffers as steps in flight, so the worker may publish once per step; see `EvictedCountsV2`."""
    patch_vllm(monkeypatch)
    for num_buffers in (2, 3):
        pool = UvaBufferPool(4, torch.int32, max_concurrency=num_buffers)
        places = [pool.copy_to_uva([i]).data_ptr() for i in range(2 * num_buffers)]
        assert places[:num_buffers] == places[num_buffers:]
        assert len(set(places)) == num_buffers
    assert "set_default_max_concurrency(vllm_config.max_concurrent_batches)" in inspect.getsource(
        GPUModelRunner.__init__
    )
    assert "self.batch_queue_size = vllm_config.max_concurrent_batches" in inspect.getsource(EngineCore.__init__)
    assert in_order(
        EngineCore.step_with_batch_queue,
        "assert len(batch_queue) < self.batch_queue_size",
        "self.model_executor.execute_model(",
        "batch_queue.pop()",
    )


def test_the_order_of_a_step():
    """States are removed before others are added, rows are complete before kernels read them, slots precede lengths."""
    assert in_order(
        GPUModelRunner.execute_model,
        "self.finish_requests(",
        "self.add_requests(",
        "self.update_requests(",
        "self.block_tables.apply_staged_writes()",
        "self.prepare_inputs(",
        "self.prepare_attn(input_batch)",
        "self.model_state.prepare_attn(",
    )
    assert in_order(
        GPUModelRunner.prepare_attn,
        "self.block_tables.gather_block_tables(",
        "self.block_tables.compute_slot_mappings(",
        "input_batch.idx_mapping,",
        "input_batch.query_start_loc,",
        "input_batch.positions,",
        "num_tokens_padded=",
    )
    assert "build_attn_metadata(" in inspect.getsource(DefaultModelState.prepare_attn)
    assert in_order(GPUModelRunner.prepare_inputs, "idx_mapping = async_tensor_h2d(", "dtype=torch.int64")


def test_dummy_batches_are_marked():
    assert "get_dummy_block_tables(" in inspect.getsource(GPUModelRunner.prepare_dummy_attn)
    assert "get_dummy_block_tables(" in inspect.getsource(cudagraph_utils.prepare_inputs_to_capture)


def test_the_order_of_a_batch_whose_metadata_does_not_tell_it():
    """`RunnerV2` finds it as vLLM does; drafts are refused for these models."""
    assert "req_idx=" in inspect.getsource(DefaultModelState.prepare_attn)
    for used in ("sort_batch_req_ids(", "self.decode_query_len ="):
        assert used in inspect.getsource(GPUModelRunner)
    assert sort_batch_req_ids({"a": 7, "b": 1, "c": 3, "d": 1}, {}, 1) == ["b", "d", "c", "a"]


def test_attributes_of_the_runner_and_the_worker():
    made = inspect.getsource(GPUModelRunner.__init__) + inspect.getsource(GPUModelRunner.initialize_kv_cache)
    for name in ("max_num_reqs", "device", "req_states", "block_tables", "attn_groups"):
        assert f"self.{name}" in made
    assert "self.req_id_to_index" in inspect.getsource(RequestState.__init__)
    assert isinstance(VllmConfig.use_v2_model_runner, property)
    assert {"kv_cache_memory_bytes", "user_specified_block_size"} <= {field.name for field in fields(CacheConfig)}
