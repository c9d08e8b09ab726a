"""What attention by classes of heads relies on in vLLM, for both backends, checked without a GPU."""

import ast
import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import vllm
from vllm.model_executor.layers.attention import attention
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.attention.backends import cpu_attn, flash_attn
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.gpu import attn_utils, cudagraph_utils

from vllm_l2kv.worker.by_head import ARGUMENTS
from vllm_l2kv.worker.heads import FullHeads, SplitAttention

BACKENDS = [
    (cpu_attn.CPUAttentionBackend, cpu_attn.CPUAttentionBackendImpl),
    (flash_attn.FlashAttentionBackend, flash_attn.FlashAttentionImpl),
]


@pytest.mark.parametrize(("backend", "impl"), BACKENDS)
def test_an_implementation_is_called_as_the_split_one_is(backend, impl):
    for name in ("forward", "do_kv_cache_update", "get_impl_variants"):
        ours, theirs = (list(inspect.signature(getattr(of, name)).parameters) for of in (SplitAttention, impl))
        assert ours == theirs
    assert {"num_heads", "num_kv_heads", "sinks"} <= set(impl.__init__.__code__.co_names)


@pytest.mark.parametrize(("backend", "impl"), BACKENDS)
def test_keys_are_written_before_attention_and_by_nothing_else(backend, impl):
    """A fused kernel that writes them would bypass the split attention."""
    assert backend.forward_includes_kv_cache_update is False
    fused = [name for name in vars(AttentionImpl) if name.startswith(("fused_", "do_qk", "do_rope"))]
    assert len(fused) > 4
    assert all(getattr(impl, name) is getattr(AttentionImpl, name) for name in fused)


@pytest.mark.parametrize(("backend", "impl"), BACKENDS)
def test_attention_on_a_cache_needs_no_keys(backend, impl):
    source = inspect.getsource(impl.forward)
    for name in ("key", "value"):
        for place in source.split(f"{name}[:num_actual_tokens]")[:-1]:
            # Encoders and context parallelism, which are refused.
            assert place.rstrip().endswith(("query[:num_actual_tokens],", "key[:num_actual_tokens],")), place[-200:]


def test_an_implementation_is_found_by_name_while_the_model_runs():
    for function in (attention.unified_attention_with_output, attention.unified_kv_cache_update):
        source = inspect.getsource(inspect.unwrap(function))
        assert "get_attention_context(layer_name)" in source
        assert ".impl." in source
    source = inspect.getsource(attention.get_attention_context)
    for part in ("attn_metadata_raw[layer_name]", "no_compile_layers[layer_name]", "slot_mapping.get(layer_name)"):
        assert part in source


def test_a_second_layer_needs_no_more():
    assert AttentionLayerBase.__abstractmethods__ == {"get_attn_backend", "get_kv_cache_spec"}
    assert not issubclass(FullHeads, Attention)
    assert 'getattr(layer, "impl", layer)).num_heads' in inspect.getsource(get_num_attention_heads_from_layers)
    source = inspect.getsource(attn_utils.init_attn_backend)
    for part in ("attn_layers[layer_name].get_attn_backend()", 'getattr(attn_layers[layer_name], "num_heads", 0)'):
        assert part in source


def test_memory_is_measured_on_whole_layers():
    """There vLLM asks its runner, not the worker, for specs; so attention is split after that."""
    assert "runner.get_kv_cache_spec()" in inspect.getsource(cudagraph_utils._init_minimal_kv_cache_for_profiling)
    source = inspect.getsource(EngineCore._initialize_kv_caches)
    steps = ("get_kv_cache_specs()", "determine_available_memory()", "initialize_from_config(")
    places = [source.find(step) for step in steps]
    assert -1 not in places
    assert places == sorted(places)


def test_flash_attentions_operator_takes_these_arguments():
    """vLLM passes all arguments, in the operator's order, which otherwise only a GPU would check."""
    path = Path(vllm.__file__).with_name("vllm_flash_attn") / "flash_attn_interface.py"
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    (call,) = (call for call in calls if ast.unparse(call.func) == "torch.ops._vllm_fa3_C.fwd")
    given = [ast.unparse(argument) for argument in call.args]
    assert len(given) == len(ARGUMENTS)
    theirs = {"block_table": "page_table", "causal": "is_causal"}
    for ours, name in zip(ARGUMENTS, given, strict=True):
        assert name in (ours, str(ARGUMENTS[ours])) or theirs.get(name) == ours or name.startswith("real_window"), name


def test_decoding_by_head_reads_what_flash_attention_has():
    names = {"vllm_flash_attn_version", "batch_invariant_enabled", "dcp_world_size", "sinks", "sliding_window"}
    names |= {"kv_cache_dtype", "supports_quant_query_input", "scale", "logits_soft_cap"}
    assert names <= set(flash_attn.FlashAttentionImpl.__init__.__code__.co_names)
    metadata = {field.name for field in fields(flash_attn.FlashAttentionMetadata)}
    assert {"block_table", "seq_lens", "max_query_len", "max_seq_len", "max_num_splits"} <= metadata


def test_a_builder_asks_in_each_step_whether_to_make_schedules():
    builder = flash_attn.FlashAttentionMetadataBuilder
    assert "aot_schedule" in builder.__init__.__code__.co_names
    assert "self.aot_schedule and" in inspect.getsource(builder.build)
