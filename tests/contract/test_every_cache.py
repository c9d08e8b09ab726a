"""Every kind of cache that a vLLM model can request is known here: it is compacted, left unchanged, or refused.

The test reads vLLM's source, so a kind that a new version adds fails here before a model with it starts.
"""

import ast
from collections.abc import Iterator
from dataclasses import MISSING, fields
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import vllm
from classified import classify_layers
from vllm.v1 import kv_cache_interface
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    KVQuantMode,
    MambaSpec,
    SlidingWindowSpec,
)

from vllm_l2kv.kv_cache_spec import (
    KNOWN_FIELDS,
    ChunkedLayerSpec,
    CompressedLayerSpec,
    RecurrentLayerSpec,
    SlidingLayerSpec,
)
from vllm_l2kv.settings import Settings

SOURCE = Path(vllm.__file__).parent
PLAIN = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.bfloat16)
VALUES = {
    "block_size": 16,
    "num_kv_heads": 2,
    "head_size": 8,
    "dtype": torch.bfloat16,
    "sliding_window": 32,
    "attention_chunk_size": 32,
    "rswa_window": 32,
    "sink_len": 4,
    "buffer_size": 32,
    "page_size": 256,
    "blocks_per_request": 2,
    "shapes": ((4, 8),),
    "dtypes": (torch.float32,),
    "kv_cache_specs": {"model.layers.1.attn": PLAIN},
}
BECOMES = {
    FullAttentionSpec: CompressedLayerSpec,
    MambaSpec: RecurrentLayerSpec,
    SlidingWindowSpec: SlidingLayerSpec,
    ChunkedLocalAttentionSpec: ChunkedLayerSpec,
}
ABSTRACT = {"KVCacheSpec", "AttentionSpec"}
ASK_FOR_THEM = {
    # Attention of ordinary models, and the chunks of Llama 4.
    "model_executor/layers/attention/attention.py Attention",
    "model_executor/layers/attention/chunked_local_attention.py ChunkedLocalAttention",
    # States of any kind: they are left unchanged.
    "model_executor/layers/mamba/abstract.py MambaBase",
    *(f"models/qwen4_exp/{device}/model.py Qwen4ExpForCausalLM" for device in ("amd", "nvidia")),
    # Special layers, which `check_attention` refuses: biases by distance, and rows chosen by an index.
    *(f"models/inkling/{device}/attention.py InklingAttention" for device in ("amd", "nvidia")),
    *(f"models/inkling/{device}/sconv_swa_attn.py InklingConvState" for device in ("amd", "nvidia")),
    *(f"models/minimax_m3/{device}/model.py MiniMaxM3SparseAttention" for device in ("amd", "nvidia")),
    *(f"models/qwen4_exp/{device}/qsa.py Qwen4ExpQSAAttention" for device in ("amd", "nvidia")),
    # Summaries of eight tokens, which `classify_layers` refuses.
    "models/step5/nvidia/sparse_summary_cache.py Step5SparseSummaryCacheLayer",
    # Not layers, but sizes of blocks.
    "platforms/interface.py Platform",
}
"""File and class of each code that makes a spec of exactly these classes. Check what a new one caches."""


def subclasses(of: type) -> Iterator[type]:
    for each in of.__subclasses__():
        yield each
        yield from subclasses(each)


def of_vllm() -> list[type[KVCacheSpec]]:
    return [each for each in subclasses(KVCacheSpec) if each.__module__.startswith("vllm.")]


def example(spec_class: type[KVCacheSpec], **changes) -> KVCacheSpec:
    needed = [field.name for field in fields(spec_class) if field.default is MISSING and field.init]
    missing = set(needed) - set(VALUES)
    assert not missing, f"{spec_class.__name__} has fields that this test does not know: {missing}"
    return spec_class(**{**{name: VALUES[name] for name in needed}, **changes})


def classified(spec: KVCacheSpec) -> KVCacheSpec:
    return classify_layers({"model.layers.0.attn": PLAIN, "model.layers.1.attn": spec}, Settings(()))[
        "model.layers.1.attn"
    ]


@pytest.mark.parametrize("spec_class", of_vllm(), ids=lambda each: each.__name__)
def test_a_kind_of_cache(spec_class):
    if spec_class in BECOMES:
        assert type(classified(example(spec_class))) is BECOMES[spec_class]
    elif spec_class.__name__ not in ABSTRACT:
        with pytest.raises(ValueError, match=f"model.layers.1.attn .*{spec_class.__name__}.*serve this model"):
            classified(example(spec_class))


@pytest.mark.parametrize("name", [field.name for field in fields(FullAttentionSpec) if field.name not in KNOWN_FIELDS])
def test_a_field_that_is_not_known(name):
    with pytest.raises(ValueError, match=f"model.layers.1.attn .*{name}=7.*serve this model with stock vLLM"):
        classified(example(FullAttentionSpec, **{name: 7}))


@pytest.mark.parametrize(
    "changes",
    [
        {"head_size_v": 16},
        {"sliding_window": 32},
        {"attention_chunk_size": 32},
        {"non_causal": True},
        {"dtype": torch.uint8},
        {"dtype": torch.uint8, "kv_quant_mode": KVQuantMode.NVFP4},
        {"tokens_per_state": Fraction(1, 4)},
    ],
)
def test_a_value_that_is_not_known(changes):
    with pytest.raises(ValueError, match=r"Layer model.layers.1.attn .*; "):
        classified(example(FullAttentionSpec, **changes))


def test_fields_that_do_not_affect_rows():
    known = {field.name for field in fields(FullAttentionSpec)} & KNOWN_FIELDS
    assert KNOWN_FIELDS - known <= {"is_draft"}  # new in 0.33
    same = example(FullAttentionSpec, page_size_padded=2**20, max_tp_shards=2, block_stride_alignment=64)
    assert type(classified(same)) is CompressedLayerSpec
    assert classified(same).page_size_padded == 2**20


def test_every_kind_is_among_them():
    """Also specs that a model or a backend defines in a module that is not imported here."""
    names = {each.__name__ for each in (KVCacheSpec, *of_vllm())}
    defined = {
        name
        for path, tree in parsed("Spec(")
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if (name := node.name) and getattr(base, "id", getattr(base, "attr", None)) in names
    }
    assert defined == names - {"KVCacheSpec"}
    assert all(hasattr(kv_cache_interface, name) for name in defined)


def test_callers_that_make_caches_which_compact_or_stay():
    wanted = {each.__name__ for each in BECOMES}
    found = {f"{path} {owner}" for path, tree in parsed("Spec(") for owner in makers(tree, wanted)}
    assert found, SOURCE
    assert found <= ASK_FOR_THEM


def parsed(mark: str) -> Iterator[tuple[str, ast.Module]]:
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        if mark in text:
            yield path.relative_to(SOURCE).as_posix(), ast.parse(text)


def makers(tree: ast.Module, wanted: set[str]) -> Iterator[str]:
    """Returns names of classes, or of module-level functions, that call one of the wanted classes."""
    for owner in tree.body:
        for node in ast.walk(owner):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) in wanted:
                yield getattr(owner, "name", "")
