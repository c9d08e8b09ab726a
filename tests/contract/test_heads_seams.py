"""What attention by classes of heads relies on in vLLM, for both backends; most machines have no GPU to notice."""

import inspect

import pytest
from vllm.model_executor.layers.attention import attention
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.attention.backends import cpu_attn, flash_attn
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.gpu import attn_utils, cudagraph_utils

from vllm_l2kv.worker.heads import FullHeads, SplitAttention

BACKENDS = [
    (cpu_attn.CPUAttentionBackend, cpu_attn.CPUAttentionBackendImpl),
    (flash_attn.FlashAttentionBackend, flash_attn.FlashAttentionImpl),
]


@pytest.mark.parametrize(("backend", "impl"), BACKENDS)
def test_an_implementation_is_called_as_ours_is(backend, impl):
    for name in ("forward", "do_kv_cache_update", "get_impl_variants"):
        ours, theirs = (list(inspect.signature(getattr(of, name)).parameters) for of in (SplitAttention, impl))
        assert ours == theirs
    assert {"num_heads", "num_kv_heads", "sinks"} <= set(impl.__init__.__code__.co_names)


@pytest.mark.parametrize(("backend", "impl"), BACKENDS)
def test_keys_are_written_before_attention_and_by_nothing_else(backend, impl):
    """A fused kernel that writes them would go around us."""
    assert backend.forward_includes_kv_cache_update is False
    fused = [name for name in vars(AttentionImpl) if name.startswith(("fused_", "do_qk", "do_rope"))]
    assert len(fused) > 4
    assert all(getattr(impl, name) is getattr(AttentionImpl, name) for name in fused)


@pytest.mark.parametrize(("backend", "impl"), BACKENDS)
def test_attention_on_a_cache_needs_no_keys(backend, impl):
    source = inspect.getsource(impl.forward)
    for name in ("key", "value"):
        for place in source.split(f"{name}[:num_actual_tokens]")[:-1]:
            # Those of encoders and of context parallelism, which we refuse.
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
    """vLLM asks its runner for specs there, not the worker; so attention is split after that."""
    assert "runner.get_kv_cache_spec()" in inspect.getsource(cudagraph_utils._init_minimal_kv_cache_for_profiling)
    source = inspect.getsource(EngineCore._initialize_kv_caches)
    steps = ("get_kv_cache_specs()", "determine_available_memory()", "initialize_from_config(")
    places = [source.find(step) for step in steps]
    assert -1 not in places
    assert places == sorted(places)
