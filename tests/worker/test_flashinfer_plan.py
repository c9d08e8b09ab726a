"""FlashInfer's plans for compacted requests, made by vLLM's own builder, without FlashInfer's kernels.

FlashInfer's native path plans pages and rows of each request from lengths on the host.
"""

import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_runner_v2_interpreted.py runs these in Triton's interpreter", allow_module_level=True)

from fake_gpu import CPU, HostRunner, order, patch_vllm
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import AttentionGroup

from vllm_l2kv.kv_cache_spec import CompressedLayerSpec
from vllm_l2kv.worker.runner import Step
from vllm_l2kv.worker.runner_v2 import RunnerV2

NAME, PAGE = "model.layers.0.attn", 16
STATES = {"whole": 5, "compacted": 2, "prompt": 7}
HELD = {"whole": 20, "compacted": 40 - 27, "prompt": 50 - 30}
BLOCKS = {"whole": [1, 4], "compacted": [21], "prompt": [9, 10]}


class Wrapper:
    """A fake wrapper of FlashInfer that records its plan."""

    is_cuda_graph_enabled = False

    def __init__(self, *args, **kwargs):
        self.planned = None

    def plan(self, **planned):
        self.planned = planned


@pytest.fixture
def backend(monkeypatch):
    """vLLM's module for FlashInfer, which is not installed here."""
    patch_vllm(monkeypatch)
    for name in ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils"):
        made = ModuleType(name)
        made.__getattr__ = lambda _name: Wrapper
        monkeypatch.setitem(sys.modules, name, made)
    sys.modules["flashinfer"].get_seq_lens = lambda indptr, last, page: (indptr[1:] - indptr[:-1] - 1) * page + last
    monkeypatch.delitem(sys.modules, "vllm.v1.attention.backends.flashinfer", raising=False)
    import vllm.v1.attention.backends.flashinfer as module

    monkeypatch.setattr(module, "get_per_layer_parameters", lambda *_: {})
    same = {"has_same_window_lefts": True, "has_same_all_params": True, "has_sinks": False}
    parameters = SimpleNamespace(sm_scale=0.3, window_left=-1, logits_soft_cap=None, **same)
    monkeypatch.setattr(module, "infer_global_hyperparameters", lambda _: parameters)
    monkeypatch.setattr(module, "can_use_trtllm_attention", lambda *_, **__: False)
    monkeypatch.setattr(module, "use_trtllm_attention", lambda *_, **__: False)
    monkeypatch.setattr(module, "pin_host_range_buf", lambda _: None)
    monkeypatch.setattr(module, "get_dcp_world_size_and_rank", lambda _: (1, 0))
    yield module
    monkeypatch.delitem(sys.modules, "vllm.v1.attention.backends.flashinfer")


def config():
    model = SimpleNamespace(max_model_len=128, dtype=torch.bfloat16, get_num_attention_heads=lambda _: 4)
    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.NONE, max_cudagraph_capture_size=None, static_forward_context={}
    )
    return SimpleNamespace(
        model_config=model,
        compilation_config=compilation,
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBNHC),
        attention_config=SimpleNamespace(disable_flashinfer_q_quantization=True, use_trtllm_attention=False),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=128, max_num_seqs=8),
        parallel_config=SimpleNamespace(cp_kv_cache_interleave_size=1, decode_context_parallel_size=1),
        speculative_config=None,
        num_speculative_tokens=0,
    )


def metadata(runner, lengths, num_tokens):
    """Returns metadata of a step that computes so many tokens of each request."""
    states = [*STATES.values()]
    starts = torch.tensor([0, *np.cumsum(num_tokens)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n - new, n) for n, new in zip(lengths, num_tokens, strict=True)])
    tables = runner.block_tables.gather_block_tables(torch.tensor(states), len(states))
    slots = runner.block_tables.compute_slot_mappings(torch.tensor(states), starts, positions, len(positions))
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=len(states),
        num_actual_tokens=len(positions),
        max_query_len=max(num_tokens),
        max_seq_len=max(lengths),
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        req_idx=np.array(states, dtype=np.int32),
        block_table_tensor=tables[0],
        slot_mapping=slots[0],
    )


def test_flashinfer_plans_the_rows_that_requests_hold(backend):
    runner = HostRunner([PAGE], max_model_len=128, max_num_tokens=128)
    runner.req_states.req_id_to_index.update(STATES)
    spec = CompressedLayerSpec(block_size=PAGE, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    builder = backend.FlashInferMetadataBuilder(spec, [NAME], config(), CPU)
    group = AttentionGroup(backend.FlashInferBackend, [NAME], spec, 0, metadata_builders=[builder])
    runner.attn_groups = [[group]]
    for state in STATES.values():
        runner.block_tables.append_block_ids(state, ([1, 4, 2, 3],), overwrite=True)
    v2 = RunnerV2(runner, [0])
    evicted = {"compacted": 27, "prompt": 30}
    orders = [order(name, n, destination=tuple(BLOCKS[name])) for name, n in evicted.items()]
    v2.begin_step(Step(orders=orders))
    runner.block_tables.apply_staged_writes()
    built = runner.attn_groups[0][0].build_metadata(metadata(runner, [20, 40, 50], [1, 1, 6]))
    assert (built.num_decodes, built.num_prefills) == (2, 1)
    for names, planned, prefix in (
        (["whole", "compacted"], built.decode.wrapper.planned, ""),
        (["prompt"], built.prefill.wrapper.planned, "paged_kv_"),
    ):
        assert planned["seq_lens"].tolist() == [HELD[name] for name in names]
        begins = planned[f"{prefix}indptr"].tolist()
        for name, begin, end in zip(names, begins, begins[1:], strict=False):
            assert planned[f"{prefix}indices"][begin:end].tolist() == BLOCKS[name]
