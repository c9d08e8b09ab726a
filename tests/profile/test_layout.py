"""Layouts of tiny models, and layouts that are refused."""

import math

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from vllm_l2kv.profile import Rope
from vllm_l2kv.tools.profile.model import layout, slow_frequencies

WINDOWED = {"gemma2": [0, 2], "gemma3": [0, 1, 3, 4]}
SLOW_ENOUGH = math.pi / 2 / 4096
"""Radians a position: a quarter circle over the context of tiny models."""
ROPES = {
    "phi3": Rope(24, False, 1),
    "glm": Rope(16, True, 1),
    "glm4": Rope(16, True, 1),
    "glm4_moe": Rope(16, False, 1),
    # Sliding layers have faster pairs.
    "gemma3": Rope(32, False, 6),
}


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "glm", "glm4", "glm4_moe"]
)
def test_layouts_are_recognized(tiny_model, kind):
    shape, rope = layout(loaded(tiny_model(kind)))
    assert (shape.num_kv_heads, shape.head_size) == (2, 32)
    assert sorted(set(range(shape.num_layers)) - set(shape.compressible)) == WINDOWED.get(kind, [])
    assert rope == ROPES.get(kind, Rope(32, False, 2))


@pytest.mark.parametrize(
    ("kind", "with_keys", "rope"),
    [
        ("lfm2", (1, 3, 5), Rope(64, False, 13)),
        ("lfm2_moe", (1, 3, 5), Rope(64, False, 13)),
        ("nemotron_h", (3, 6, 9), Rope(0, False)),  # positions only in recurrent layers
        ("granite_hybrid", (1, 3, 5), Rope(32, False, 2)),
        ("qwen3_next", (1, 3, 5), Rope(8, False)),
        ("qwen3_5", (1, 3, 5), Rope(8, False)),
    ],
)
def test_layers_with_keys_are_recognized_among_others(tiny_model, kind, with_keys, rope):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=torch.float32).eval()
    shape, found = layout(model)
    assert shape.compressible == with_keys
    assert shape.num_layers == model.config.num_hidden_layers
    assert found == rope


def test_a_quarter_of_each_key_is_rotated(tiny_model):
    """GPT-NeoX, with a KV head for each query head."""
    shape, rope = layout(loaded(tiny_model("gpt_neox")))
    assert (shape.num_layers, shape.num_kv_heads, shape.head_size) == (4, 4, 32)
    assert rope == Rope(8, False)


def test_gemma_3n_is_refused(tiny_model):
    with pytest.raises(ValueError, match="Gemma3nForCausalLM has layers that read another layer's cache"):
        layout(loaded(tiny_model("gemma3n")))


def test_a_model_that_forgets_its_states_is_refused(tiny_model):
    """A fault of transformers, not of vLLM: Jamba's scan of several tokens starts from an empty state."""
    with pytest.raises(ValueError, match="JambaForCausalLM loses its state"):
        layout(AutoModelForCausalLM.from_pretrained(tiny_model("jamba"), dtype=torch.float32).eval())


@pytest.mark.parametrize(
    ("parameters", "slow_pairs"),
    [
        ({"rope_type": "linear", "factor": 16.0}, 7),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            5,
        ),
    ],
)
def test_scaled_pairs_turn_more_slowly(parameters, slow_pairs):
    model = AutoModelForCausalLM.from_config(tiny.llama(rope_parameters={"rope_theta": 1e4} | parameters)).eval()
    assert layout(model)[1].slow_pairs == slow_pairs
    angles = 1e4 ** (-torch.arange(16) / 16) / parameters["factor"]
    assert torch.equal(slow_frequencies(model, 16), model.model.rotary_emb.inv_freq[16 - slow_pairs :])
    torch.testing.assert_close(slow_frequencies(model, 16), angles[angles < SLOW_ENOUGH])


def test_pairs_whose_slowness_is_unknown(tiny_model):
    model = loaded(tiny_model("llama"))
    assert len(slow_frequencies(model, 16)) == 2
    assert len(slow_frequencies(model, 8)) == 0
    inv_freq = model.model.rotary_emb.inv_freq
    model.model.rotary_emb.inv_freq = inv_freq.flip(0)
    assert len(slow_frequencies(model, 16)) == 0
    model.model.rotary_emb.inv_freq, model.config.__dict__["max_position_embeddings"] = inv_freq, None
    assert len(slow_frequencies(model, 16)) == 0


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mistral", {"sliding_window": 32}, "has a sliding window in every layer"),
        ("llama", {"kv_lora_rank": 8}, "has MLA, whose cache holds no keys"),
        ("llama", {"num_kv_shared_layers": 2}, "has layers that read another layer's cache"),
        (
            "llama",
            {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]},
            "has layers of type chunked_attention",
        ),
        (
            "llama",
            {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            "does not tell its window",
        ),
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
