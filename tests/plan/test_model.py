"""Models read from their configs."""

import json

import pytest
import tiny
import torch
from hybrid_shapes import MODELS
from safetensors.torch import save_file
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    Qwen3NextConfig,
    T5Config,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, MambaSpec, SlidingWindowSpec

from vllm_l2kv.tools.plan.model import model_of, read_config, weight_bytes


@pytest.fixture
def folder_of(tmp_path):
    def write(config) -> str:
        config.save_pretrained(tmp_path)
        return str(tmp_path)

    return write


def test_a_plain_model(folder_of):
    model = model_of(read_config(folder_of(tiny.llama(dtype="bfloat16"))), "auto")
    assert (model.layer_types, model.num_kv_heads, model.head_size) == (("full_attention",) * 4, 2, 32)
    assert model.dtype == torch.bfloat16
    specs = model.specs(16, "auto", num_gpus=1)
    assert [type(spec) for spec in specs.values()] == [FullAttentionSpec] * 4
    assert {spec.page_size_bytes for spec in specs.values()} == {16 * 2 * 2 * 32 * 2}


def test_windows(folder_of):
    model = model_of(read_config(folder_of(tiny.gemma3())), "float32")
    assert model.layer_types == ("sliding_attention", "sliding_attention", "full_attention") * 2
    assert model.window == tiny.SLIDING_WINDOW
    types = [type(spec) for spec in model.specs(32, "auto", num_gpus=1).values()]
    assert types == [SlidingWindowSpec, SlidingWindowSpec, FullAttentionSpec] * 2


def test_a_window_for_every_layer(folder_of):
    config = MistralConfig(num_hidden_layers=2, sliding_window=4096)
    model = model_of(read_config(folder_of(config)), "auto")
    assert (model.layer_types, model.window) == (("sliding_attention",) * 2, 4096)


@pytest.mark.parametrize(
    ("stored", "asked", "dtype"), [("float32", "auto", "bfloat16"), ("bfloat16", "float32", "float32")]
)
def test_dtype(folder_of, stored, asked, dtype):
    model = model_of(read_config(folder_of(tiny.llama(dtype=stored))), asked)
    assert model.dtype == getattr(torch, dtype)


def test_fp8_halves_the_cache(folder_of):
    model = model_of(read_config(folder_of(tiny.llama(dtype="bfloat16"))), "auto")
    plain, fp8 = (next(iter(model.specs(16, kind, num_gpus=1).values())) for kind in ("auto", "fp8"))
    assert 2 * fp8.page_size_bytes == plain.page_size_bytes
    assert fp8.kv_quant_mode == KVQuantMode.FP8_PER_TENSOR


@pytest.mark.parametrize(("num_gpus", "num_kv_heads"), [(1, 2), (2, 1), (4, 1)])
def test_heads_are_shared_out_or_repeated(folder_of, num_gpus, num_kv_heads):
    model = model_of(read_config(folder_of(tiny.llama())), "auto")
    assert {spec.num_kv_heads for spec in model.specs(16, "auto", num_gpus).values()} == {num_kv_heads}


def test_heads_that_cannot_be_shared_out(folder_of):
    model = model_of(read_config(folder_of(tiny.llama())), "auto")
    with pytest.raises(ValueError, match="--tensor-parallel-size must divide the model's 4 heads, got 3"):
        model.specs(16, "auto", num_gpus=3)


def test_kv_heads_that_the_engine_refuses(folder_of):
    """By the engine's own rule, although the query heads could be divided."""
    shape = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = model_of(read_config(folder_of(tiny.llama(**shape))), "auto")
    assert model.specs(16, "auto", num_gpus=6)
    with pytest.raises(ValueError, match="does not support 3 KV heads on 2 ranks"):
        model.specs(16, "auto", num_gpus=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DeepseekV3Config(num_hidden_layers=2), "MLA"),
        (tiny.llama4(), "layers of type chunked_attention"),
        (tiny.gemma3n(), "its config has num_kv_shared_layers"),
        (T5Config(num_layers=2), "encoder-decoder"),
        (LlamaConfig(num_hidden_layers=2, global_head_dim=512), "its config has global_head_dim"),
    ],
    ids=["mla", "chunks", "shared", "t5", "uneven"],
)
def test_models_that_are_refused(folder_of, config, message):
    with pytest.raises(ValueError, match=message):
        model_of(read_config(folder_of(config)), "auto")


@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        # Configs whose defaults come from a model in `MODELS`.
        pytest.param(Qwen3NextConfig, "Qwen3NextForCausalLM", "Qwen3-Next-80B", id="Qwen3-Next"),
        pytest.param(NemotronHConfig, "NemotronHForCausalLM", "Nemotron-H-8B", id="Nemotron-H"),
    ],
)
def test_states_and_rows_have_blocks_of_one_size(folder_of, config, name, shape):
    """Sizes as in vLLM's engines, from `hybrid_shapes`."""
    shape = MODELS[shape]
    attention = {"num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_size}
    folder = folder_of(config(dtype="bfloat16", architectures=[name], **attention))
    model = model_of(read_config(folder), "auto")
    specs, expected = model.specs(16, "auto", num_gpus=1), shape.specs(has_prefix_cache=True)
    kinds = {type(spec): spec for spec in specs.values()}
    assert kinds == {type(spec): spec for spec in expected.values()}
    assert len(specs) == sum(kind not in ("mlp", "moe") for kind in model.layer_types)
    of_two = {type(spec): spec for spec in model.specs(16, "auto", num_gpus=2).values()}
    assert of_two[MambaSpec].shapes != kinds[MambaSpec].shapes, "ranks share a state"


def test_recurrent_layers_that_vllm_does_not_know(folder_of):
    model = model_of(read_config(folder_of(tiny.qwen3_next())), "auto")
    with pytest.raises(ValueError, match="vLLM has no state of recurrent layers for Qwen3NextModel"):
        model.specs(16, "auto", num_gpus=1)


def test_no_config(tmp_path):
    with pytest.raises(ValueError, match="cannot read the config of"):
        read_config(str(tmp_path))


class TestWeights:
    def test_counted(self, folder_of):
        config = tiny.llama()
        folder = folder_of(config)
        size, source = weight_bytes(folder, read_config(folder), torch.bfloat16)
        per_layer = 64 * (4 + 2 + 2 + 4) * 32 + 3 * 64 * 128 + 2 * 64
        assert size == 2 * (49152 * 64 + 4 * per_layer + 64)
        assert source == "parameters counted by the config"

    def test_of_llama_3_1_8b(self, llama_8b):
        """The model's own files have 8,030,261,248 parameters."""
        size, _ = weight_bytes(llama_8b, read_config(llama_8b), torch.bfloat16)
        assert size == 2 * 8_030_261_248

    def test_read_from_files(self, folder_of, tmp_path):
        folder = folder_of(tiny.llama())
        tensors = {"a": torch.zeros(3, 5, dtype=torch.float32), "b": torch.zeros(7, dtype=torch.int8)}
        save_file(tensors, tmp_path / "model.safetensors")
        size, source = weight_bytes(folder, read_config(folder), torch.bfloat16)
        assert (size, source) == (2 * 15 + 7, "headers of the safetensors files")

    def test_quantized_weights_without_files(self, folder_of, tmp_path):
        folder = folder_of(tiny.llama())
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "awq"}}))
        with pytest.raises(ValueError, match="--weights-gib"):
            weight_bytes(folder, read_config(folder), torch.bfloat16)


def test_gemma_3_270m_compresses_three_layers(folder_of):
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 3
    config = Gemma3TextConfig(num_hidden_layers=18, layer_types=types, sliding_window=512, num_key_value_heads=1)
    model = model_of(read_config(folder_of(config)), "auto")
    assert model.shape.compressible == (5, 11, 17)
