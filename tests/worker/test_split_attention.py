"""Attention by classes of heads without an engine, with a fake of vLLM's implementation and its named metadata."""

from types import SimpleNamespace

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context

from vllm_l2kv.kv_cache_spec import CompressedLayerSpec, FullLayerSpec
from vllm_l2kv.worker import worker
from vllm_l2kv.worker.heads import FullHeads, SplitAttention, check_split, split_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, NUM_TOKENS = 8, 4, 2, 3
NAME, FULL = "model.layers.0.attn", "model.layers.0.attn.full"
CPU = torch.device("cpu")


class Impl:
    """A fake that attends by adding a number of the metadata; its cache records what is written."""

    alibi_slopes = None
    supports_quant_query_input = True

    def __init__(self, sinks=None) -> None:
        self.num_heads, self.num_kv_heads, self.sinks = NUM_HEADS, NUM_KV_HEADS, sinks

    def get_impl_variants(self):
        return (self,)

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        kv_cache.append((key.clone(), value.clone(), slot_mapping))

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, block_scale=None):
        if attn_metadata is None:
            return output.fill_(0)
        assert query.shape[1] == output.shape[1] == self.num_heads
        assert output.is_contiguous()
        sinks = 0 if self.sinks is None else self.sinks[:, None]
        return output.copy_(query.float() + attn_metadata + sinks)


def layer_of(impl, **changes):
    scales = dict.fromkeys(("_q_scale", "_k_scale", "_v_scale"), torch.tensor(1.0))
    about = {"impl": impl, "kv_cache": [], "get_attn_backend": lambda: "backend", **scales, **changes}
    return SimpleNamespace(**about)


@pytest.fixture
def split():
    """Two layers, of which one is split: its KV heads 0 and 3 are full, and the contiguous 1 and 2 are not."""
    layers = {NAME: layer_of(Impl(torch.arange(8.0) * 100)), "model.layers.1.attn": layer_of(Impl())}
    split_attention(layers, NAME, [1, 2], [0, 3], CPU)
    layers[FULL].kv_cache = []
    return layers


def context(layers, attn_metadata=None):
    return override_forward_context(
        ForwardContext(
            no_compile_layers=layers,
            attn_metadata=attn_metadata,
            slot_mapping={NAME: "slots", FULL: "slots of full heads"},
        )
    )


def states(num_heads, dtype=torch.float32):
    return torch.arange(NUM_TOKENS * num_heads * HEAD_SIZE).view(NUM_TOKENS, num_heads, HEAD_SIZE).to(dtype)


def test_every_query_head_attends_on_the_cache_of_its_class(split):
    query, output = states(NUM_HEADS), torch.full((NUM_TOKENS, NUM_HEADS, HEAD_SIZE), torch.nan)
    with context(split, {NAME: 1000, FULL: 2000}):
        split[NAME].impl.forward(split[NAME], query, None, None, split[NAME].kv_cache, 1000, output)
    of_class = torch.tensor([2000, 2000, 1000, 1000, 1000, 1000, 2000, 2000])
    assert torch.equal(output, query + (of_class + torch.arange(8) * 100)[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_keys_and_values_are_written_to_the_cache_of_their_class(split, dtype):
    key, value = states(NUM_KV_HEADS, dtype), states(NUM_KV_HEADS, dtype)
    with context(split):
        split[NAME].impl.do_kv_cache_update(split[NAME], key, value, split[NAME].kv_cache, "slots")
    for name, heads, slots in ((NAME, [1, 2], "slots"), (FULL, [0, 3], "slots of full heads")):
        ((keys, values, found),) = split[name].kv_cache
        assert keys.dtype == dtype
        assert torch.equal(keys.float(), key.float()[:, heads])
        assert torch.equal(values.float(), value.float()[:, heads])
        assert found == slots


def test_without_metadata_vllms_attention_runs(split):
    output = torch.ones(NUM_TOKENS, NUM_HEADS, HEAD_SIZE)
    split[NAME].impl.forward(split[NAME], states(NUM_HEADS), None, None, [], None, output)
    assert not output.any()


def test_metadata_builders_get_the_heads_of_each_class(split):
    impl, full = split[NAME].impl, split[FULL]
    assert (impl.num_heads, full.num_heads, full.impl.num_heads) == (4, 4, 4)
    assert [variant.num_kv_heads for variant in impl.get_impl_variants()] == [2, 2]
    assert impl.supports_quant_query_input is True
    assert isinstance(full, FullHeads)
    assert full.get_attn_backend() == "backend"
    assert full.get_kv_cache_spec(None) is None
    assert not isinstance(split["model.layers.1.attn"].impl, SplitAttention)


def test_contiguous_heads_are_not_copied():
    layers = {NAME: layer_of(Impl())}
    split_attention(layers, NAME, [2, 3], [0, 1], CPU)
    layers[FULL].kv_cache, key = [], states(NUM_KV_HEADS)
    written = []
    for variant in layers[NAME].impl.get_impl_variants():
        variant.do_kv_cache_update = lambda layer, key, *_: written.append(key)
    with context(layers):
        layers[NAME].impl.do_kv_cache_update(layers[NAME], key, key, [], "slots")
    assert [keys.untyped_storage().data_ptr() for keys in written] == [key.untyped_storage().data_ptr()] * 2


@pytest.mark.parametrize(
    ("changes", "other", "reason"),
    [
        ({"_k_scale": torch.ones(4)}, {}, "have a separate scale for each head"),
        ({}, {"kv_sharing_target_layer_name": NAME}, "layer model.layers.1.attn reads its cache"),
        ({"impl": SimpleNamespace(get_impl_variants=lambda: (1, 2))}, {}, "several implementations"),
    ],
)
def test_layers_that_cannot_be_split_are_refused(changes, other, reason):
    plain = {NAME: layer_of(Impl()), "model.layers.1.attn": layer_of(Impl(), kv_sharing_target_layer_name=None)}
    check_split(NAME, plain)
    layers = {NAME: layer_of(**{"impl": Impl(), **changes}), "model.layers.1.attn": layer_of(Impl(), **other)}
    with pytest.raises(ValueError, match=f"{NAME} must all be full or all be compressed.*{reason}.*--kv-full-heads"):
        check_split(NAME, layers)


@pytest.mark.parametrize(("num_full", "is_said"), [(0, False), (4, False), (5, True)])
def test_full_heads_that_waste_memory_are_reported(num_full, is_said, monkeypatch):
    """Of 16 heads, four full ones waste nothing; five leave a remainder of one."""
    shape = {"block_size": 16, "head_size": 8, "dtype": torch.float32}
    specs = {"a": CompressedLayerSpec(**shape, num_kv_heads=16 - num_full)}
    if num_full:
        specs["b"] = FullLayerSpec(**shape, num_kv_heads=num_full)
    said = []
    monkeypatch.setattr(worker, "logger", SimpleNamespace(warning=said.append))
    worker.advise_on_waste(specs)
    assert [sentence.partition(" of each block")[0] for sentence in said] == [
        "5 full KV heads of 16 leave 9.1%"
    ] * is_said
