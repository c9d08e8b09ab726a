"""The layout of tiny models, and layouts that are refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_l2kv.profile import Rope
from vllm_l2kv.tools.profile.model import layout

WINDOWED = {"gemma2": [0, 2], "gemma3": [0, 1, 3, 4]}
ROPES = {"phi3": Rope(24, False), "glm": Rope(16, True), "glm4": Rope(16, True)}


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "glm", "glm4"])
def test_layouts_are_seen(tiny_model, kind):
    shape, rope = layout(loaded(tiny_model(kind)))
    assert (shape.num_kv_heads, shape.head_size) == (2, 32)
    assert sorted(set(range(shape.num_layers)) - set(shape.compressible)) == WINDOWED.get(kind, [])
    assert rope == ROPES.get(kind, Rope(32, interleaved=False))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mistral", {"sliding_window": 32}, "has a sliding window in every layer"),
        ("llama", {"kv_lora_rank": 8}, "has MLA, whose cache holds no keys"),
        (
            "llama",
            {"layer_types": ["full_attention"] * 3 + ["linear_attention"]},
            "has layers of type linear_attention",
        ),
        ("llama", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "has layers whose windows"),
    ],
)
def test_what_a_profile_cannot_describe(tiny_model, kind, changes, message):
    model = loaded(tiny_model(kind))
    for name, value in changes.items():
        setattr(model.config, name, value)
    if "sliding_window" in changes:
        for layer in model.model.layers:
            layer.self_attn.config = model.config
    with pytest.raises(ValueError, match=message):
        layout(model)


def test_keys_that_are_not_rotated_in_pairs(tiny_model, monkeypatch):
    model = loaded(tiny_model("llama"))
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.apply_rotary_pos_emb",
        lambda query, key, cos, sin: (query, key + sin[:, None]),
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM rotates its keys in an unknown way"):
        layout(model)
