"""vLLM's planner with layers that have KV heads of both classes: names, groups, block sizes, one pool."""

import random
from types import SimpleNamespace

import pytest
import torch
from classified import classify_layers
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_l2kv.kv_cache_spec import (
    FLASH_ATTENTION,
    CompressedLayerSpec,
    FullLayerSpec,
    SlidingLayerSpec,
    group_layer_specs,
    is_packed,
    pack,
)
from vllm_l2kv.kv_heads import waste
from vllm_l2kv.plugin import register
from vllm_l2kv.seams import get_kv_cache_groups
from vllm_l2kv.settings import Settings

SHAPE = {"block_size": 16, "head_size": 64, "dtype": torch.bfloat16}


def layers(num_layers: int, num_heads: int, **changes):
    return layers_of("model", range(num_layers), num_heads, **changes)


def layers_of(model: str, numbers, num_heads: int, **changes):
    spec = FullAttentionSpec(**{**SHAPE, "num_kv_heads": num_heads, **changes})
    return {f"{model}.layers.{i}.attn": spec for i in numbers}


def short(name: str) -> str:
    return name.removeprefix("model.layers.").replace(".attn", "")


def test_a_mixed_layer_is_two_layers():
    settings = Settings((), {0: (1,), 1: (0, 3), 3: (0, 1, 2, 3)})
    classified = classify_layers(layers(4, 4), settings)
    assert {short(name): (type(spec), spec.num_kv_heads, spec.block_size) for name, spec in classified.items()} == {
        "0": (CompressedLayerSpec, 3, 16),
        "0.full": (FullLayerSpec, 1, 16),
        "1": (CompressedLayerSpec, 2, 16),
        "1.full": (FullLayerSpec, 2, 16),
        "2": (CompressedLayerSpec, 4, 16),
        "3": (FullLayerSpec, 4, 16),
    }


def test_a_layer_whose_heads_are_all_named_is_a_full_layer():
    of_heads = classify_layers(layers(4, 2), Settings((), {1: (0, 1)}), FLASH_ATTENTION)
    assert of_heads == classify_layers(layers(4, 2), Settings((1,)), FLASH_ATTENTION)


def test_heads_of_a_layer_that_slides_are_left_alone():
    window = SlidingWindowSpec(**SHAPE, num_kv_heads=4, sliding_window=512)
    specs = {**layers(2, 4), "model.layers.2.attn": window}
    classified = classify_layers(specs, Settings((), {2: (1,)}))
    assert [type(spec) for spec in classified.values()] == [CompressedLayerSpec, CompressedLayerSpec, SlidingLayerSpec]


def test_heads_of_a_layer_that_has_none():
    state = MambaSpec(block_size=16, shapes=((4, 8),), dtypes=(torch.float32,))
    specs = {**layers(2, 4), "model.layers.2.mamba": state}
    assert classify_layers(specs, Settings((), {1: (0,)}))["model.layers.1.attn.full"].num_kv_heads == 1
    with pytest.raises(ValueError, match="full_heads names layer 2, which has no KV heads"):
        classify_layers(specs, Settings((), {2: (0,)}))


def test_nothing_left_to_compress():
    with pytest.raises(ValueError, match="No full-attention layer is left"):
        classify_layers(layers(2, 2), Settings((0,), {1: (0, 1)}))


def test_heads_of_a_layer_unlike_the_others():
    specs = {**layers(3, 4), "model.layers.3.attn": FullAttentionSpec(**SHAPE, num_kv_heads=2)}
    assert classify_layers(specs, Settings((3,)))["model.layers.3.attn"].num_kv_heads == 2
    with pytest.raises(ValueError, match="layer 3, which has another number of them"):
        classify_layers(specs, Settings((), {3: (0,)}))


@pytest.mark.parametrize(("degree", "num_heads", "compressed", "full"), [(1, 4, 2, 2), (2, 2, 1, 1)])
def test_ranks_have_their_part(degree, num_heads, compressed, full):
    classified = classify_layers(layers(3, num_heads), Settings((), {1: (0, 3)}), None, 4, degree)
    assert classified["model.layers.1.attn"].num_kv_heads == compressed
    assert classified["model.layers.1.attn.full"].num_kv_heads == full


def test_ranks_with_other_counts_are_refused():
    with pytest.raises(ValueError, match="KV heads of layer 1 on each of the 2 tensor-parallel ranks, got 2, 0;"):
        classify_layers(layers(3, 2), Settings((), {1: (0, 1)}), None, 4, 2)
    with pytest.raises(ValueError, match="KV heads of layer 1 on each of the 4 tensor-parallel ranks, got 1, 1, 0, 0;"):
        classify_layers(layers(3, 1), Settings((), {1: (0,)}), None, 2, 4)


@pytest.mark.parametrize(
    ("num_heads", "head_size", "full_heads", "compressed", "full"),
    [
        # Two of eight in every second of 32 layers: 224 and 32 heads, pages of 48 KiB and 56 KiB.
        (8, 128, dict.fromkeys(range(1, 32, 2), (0, 5)), 16, 112),
        # One of eight in four layers: 252 and 4 heads.
        (8, 128, dict.fromkeys((3, 9, 12, 20), (7,)), 16, 1008),
        # Seven of eight in all: the other class has the longer blocks.
        (8, 128, dict.fromkeys(range(32), tuple(range(7))), 112, 16),
        # Seven of eight in one layer: blocks are joined until the one compressed head there has 32 KiB.
        (8, 128, {9: tuple(range(7))}, 64, 64 * 35),
    ],
)
def test_blocks_of_a_page_that_flash_attention_likes(num_heads, head_size, full_heads, compressed, full):
    classified = classify_layers(layers(32, num_heads, head_size=head_size), Settings((), full_heads), FLASH_ATTENTION)
    sizes = {type(spec): spec.block_size for spec in classified.values()}
    assert sizes == {CompressedLayerSpec: compressed, FullLayerSpec: full}
    assert min(spec.page_size_bytes for spec in classified.values()) >= 32 * 1024
    assert len({spec.block_stride_alignment for spec in classified.values()}) == 1


@st.composite
def choices(draw):
    """Draws numbers of full heads in each layer: some, none and all."""
    num_heads, num_layers = draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([2, 3, 6, 16]))
    counts = draw(st.lists(st.integers(0, num_heads), min_size=num_layers, max_size=num_layers))
    return num_heads, counts


@given(choices(), st.integers(0, 1000))
def test_each_class_is_one_group_of_one_pool(choice, seed):
    num_heads, counts = choice
    total, num_full = num_heads * len(counts), sum(counts)
    if num_full == total:
        return
    chance = random.Random(seed)
    full_heads = {layer: chance.sample(range(num_heads), count) for layer, count in enumerate(counts) if count}
    classified = classify_layers(layers(len(counts), num_heads), Settings((), full_heads))
    register()
    groups = get_kv_cache_groups(planner(is_packed(classified.values())), dict(classified))
    of_groups = [group_layer_specs(group) for group in groups]
    assert sum(map(len, of_groups)) == len(classified)
    for specs in of_groups:
        assert len({(type(spec), spec.block_size) for spec in specs.values()}) == 1
    if any(0 < count < num_heads for count in counts) or not num_full:
        assert len(groups) == (2 if num_full else 1)
    # A block has the same bytes in both groups, except for the loss.
    in_a_block = [sum(spec.page_size_bytes for spec in specs.values()) for specs in of_groups]
    if len(groups) == 2:
        assert 1 - min(in_a_block) / max(in_a_block) == pytest.approx(waste(num_full, total - num_full))


def planner(is_packed: bool) -> SimpleNamespace:
    """Returns the parts of vLLM's configuration that its planner reads."""
    layout = KVCacheLayout.BLHNC if is_packed else KVCacheLayout.LBHNC
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type="llama")),
    )


def test_the_class_with_fewer_bytes_has_the_longer_blocks():
    wide, narrow = (FullAttentionSpec(**SHAPE, num_kv_heads=heads) for heads in (8, 1))
    assert pack([[narrow] * 4], [[wide]], None)[:2] == (32, 16)


def test_classes_of_one_page_size_are_not_spread():
    """Their blocks need no common pool, and vLLM would apply the stride to each layer."""
    classified = classify_layers(layers(4, 2), Settings((0, 1)), FLASH_ATTENTION)
    assert len({spec.page_size_bytes for spec in classified.values()}) == 1
    assert {spec.block_stride_alignment for spec in classified.values()} == {None}


DRAFTS = {
    "EAGLE": layers_of("model", range(16, 17), 4),
    "a small model": layers_of("draft_model.model", range(6), 1),
    "the model itself": layers_of("draft_model.model", range(16), 4),
    "another head size": layers_of("draft_model.model", range(5), 2, head_size=32),
}


@pytest.mark.parametrize("drafts", DRAFTS.values(), ids=DRAFTS)
@pytest.mark.parametrize("geometry", [None, FLASH_ATTENTION])
@pytest.mark.parametrize("full_layers", [(), (0, 1)])
def test_layers_of_a_draft_model_are_full_whatever_their_numbers(drafts, geometry, full_layers):
    """There is one group for each class, with the drafts' group first."""
    target = layers(16, 4)
    classified = classify_layers({**target, **drafts}, Settings(full_layers), geometry, 4, drafts=drafts)
    full = {name for name, spec in classified.items() if type(spec) is FullLayerSpec}
    assert full == {*drafts, *(f"model.layers.{i}.attn" for i in full_layers)}
    assert {type(spec) for name, spec in classified.items() if name not in full} == {CompressedLayerSpec}
    register()
    of_full, *of_compressed = get_kv_cache_groups(planner(is_packed(classified.values())), dict(classified))
    assert set(of_full.layer_names) == full
    assert len(of_compressed) == 1


def test_settings_name_layers_of_the_target():
    drafts = DRAFTS["EAGLE"]
    with pytest.raises(ValueError, match=r"full_layers names layer 16, but .* 0 to 15"):
        classify_layers({**layers(16, 4), **drafts}, Settings((16,)), None, 4, drafts=drafts)


def test_drafts_that_see_a_window_are_refused():
    window = SlidingWindowSpec(**SHAPE, num_kv_heads=4, sliding_window=512)
    specs = {**layers(2, 4), "draft_model.layers.0.attn": window}
    with pytest.raises(ValueError, match="does not attend to all tokens before it; drop --speculative-config"):
        classify_layers(specs, Settings((0,)), None, 4, drafts={"draft_model.layers.0.attn"})
