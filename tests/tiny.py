"""Tiny models with random weights: real architectures, small enough to start in seconds."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from reference import Reference
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    FalconH1Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from widened import TOKENIZER_FILES

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,  # of the demo model's tokenizer
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
    # Large weights make attention select tokens, and logits differ widely.
    "initializer_range": 0.2,
}
SLIDING_WINDOW = 48
SHORT_CONVOLUTIONS: dict[str, Any] = {
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "layer_types": ["conv", "full_attention"] * 3,
    "num_hidden_layers": 6,
    "conv_L_cache": 3,
}
"""Layers of LFM2, with experts or without."""
GATED_DELTA_NETS: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 3,
    "num_hidden_layers": 6,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
"""Layers of Qwen3-Next and Qwen3.5."""


def llama(**changes: Any) -> PretrainedConfig:
    return LlamaConfig(**{**SHAPE, **changes})


def of_type(model_type: str, **changes: Any) -> PretrainedConfig:
    """A model by its type in `config.json`, for families that need no more than a name and a few changes."""
    return AutoConfig.for_model(model_type, **{**SHAPE, **changes})


def qwen2(**changes: Any) -> PretrainedConfig:
    """Biases in the projections of queries, keys and values."""
    return Qwen2Config(**{**SHAPE, **changes})


def qwen3(**changes: Any) -> PretrainedConfig:
    """Queries and keys are normalised before RoPE."""
    return Qwen3Config(**{**SHAPE, **changes})


def qwen3_moe(**changes: Any) -> PretrainedConfig:
    """Every layer has experts, two of four for each token."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return Qwen3MoeConfig(**{**SHAPE, **experts, **changes})


def mistral(**changes: Any) -> PretrainedConfig:
    """Without a window, like all Mistral models but the first."""
    return MistralConfig(**{**SHAPE, "sliding_window": None, **changes})


def phi3(**changes: Any) -> PretrainedConfig:
    """One projection of queries, keys and values; three quarters of each head are rotated."""
    partial = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}
    return Phi3Config(**{**SHAPE, **partial, **changes})


def glm(**changes: Any) -> PretrainedConfig:
    """Half of each head is rotated, in interleaved pairs."""
    return GlmConfig(**{**SHAPE, **changes})


def glm4(**changes: Any) -> PretrainedConfig:
    """Like GLM, with more norms."""
    return Glm4Config(**{**SHAPE, **changes})


def glm4_moe(**changes: Any) -> PretrainedConfig:
    """GLM-4.5: experts in all layers but the first, two of four and a shared one for each token; QK-norm and biases."""
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    return Glm4MoeConfig(**{**SHAPE, **experts, **changes})


def gpt_neox(**changes: Any) -> PretrainedConfig:
    """A KV head for each query head, of 32 elements of which a quarter is rotated; feed-forward beside attention."""
    shape = {name: value for name, value in _without_head_dim().items() if name != "num_key_value_heads"}
    return GPTNeoXConfig(**{**shape, "hidden_size": 128, "tie_word_embeddings": False, **changes})


def gemma2(**changes: Any) -> PretrainedConfig:
    """Every other layer has a sliding window; scores are capped."""
    hybrid = {"sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 32, "tie_word_embeddings": False}
    return Gemma2Config(**{**SHAPE, **hybrid, **changes})


def gemma3(num_blocks: int = 2, **changes: Any) -> PretrainedConfig:
    """Two sliding-window layers before each full-attention layer, each kind with its own RoPE."""
    types = ["sliding_attention", "sliding_attention", "full_attention"] * num_blocks
    hybrid = {
        "num_hidden_layers": len(types),
        "layer_types": types,
        "sliding_window": SLIDING_WINDOW,
        "query_pre_attn_scalar": 32,
        # Gemma scales embeddings up; if tied to the output, they would repeat the last token in any context.
        "tie_word_embeddings": False,
    }
    return Gemma3TextConfig(**{**SHAPE, **hybrid, **changes})


def gemma3n(**changes: Any) -> PretrainedConfig:
    """The text part: every other layer has a window, and the last four of eight read the caches of layers 2 and 3."""
    hybrid = {
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "num_kv_shared_layers": 4,
        "sliding_window": SLIDING_WINDOW,
        "vocab_size_per_layer_input": SHAPE["vocab_size"],
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 16,
    }
    return Gemma3nTextConfig(**{**SHAPE, **hybrid, **changes})


def gpt_oss(**changes: Any) -> PretrainedConfig:
    """Every other layer has a sliding window; each head has a sink, a learned logit besides those of the keys."""
    hybrid = {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_hidden_layers": 6,
        "sliding_window": SLIDING_WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "tie_word_embeddings": False,
    }
    return GptOssConfig(**{**SHAPE, **hybrid, **changes})


def llama4(**changes: Any) -> PretrainedConfig:
    """Every other layer attends to the token's own chunk of 64 tokens; the others have no positions."""
    hybrid = {
        "layer_types": ["chunked_attention", "full_attention"] * 3,
        "no_rope_layers": [1, 0] * 3,
        "num_hidden_layers": 6,
        "attention_chunk_size": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size": 64,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "tie_word_embeddings": False,
    }
    return Llama4TextConfig(**{**SHAPE, **hybrid, **changes})


def lfm2(**changes: Any) -> PretrainedConfig:
    """A short convolution before each attention layer.

    One head, since vLLM's CPU rotation is wrong for several heads if a model passes tensors of three dimensions.
    """
    shape = {**_without_head_dim(), **SHORT_CONVOLUTIONS, "block_auto_adjust_ff_dim": False, **changes}
    # Names in files of this model that `transformers` does not read.
    others = {
        **dict.fromkeys(("conv_dim", "block_dim", "block_ff_dim"), shape["hidden_size"]),
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
    }
    return Lfm2Config(**shape, **others)


def lfm2_moe(**changes: Any) -> PretrainedConfig:
    """The same with experts in all layers but the first two, two of four for each token, chosen with a learned bias."""
    experts = {"num_dense_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return Lfm2MoeConfig(**{**_without_head_dim(), **SHORT_CONVOLUTIONS, **experts, **changes})


def nemotron_h(**changes: Any) -> PretrainedConfig:
    """Mamba 2, attention and feed-forward in separate layers; the last kind has no cache."""
    hybrid = {
        "hybrid_override_pattern": "M-M*-M*-M*",
        "num_hidden_layers": 10,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 32,
        "conv_kernel": 4,
    }
    return NemotronHConfig(**{**SHAPE, **hybrid, **changes})


def falcon_h1(**changes: Any) -> PretrainedConfig:
    """Mamba 2 and attention side by side in each layer."""
    hybrid = {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_chunk_size": 32,
    }
    return FalconH1Config(**{**SHAPE, **hybrid, **changes})


def granite_hybrid(**changes: Any) -> PretrainedConfig:
    """Mamba 2 before each attention layer, with rotary embeddings."""
    hybrid = {
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "layer_types": ["mamba", "attention"] * 3,
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 32,
        "mamba_expand": 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 128,
        "position_embedding_type": "rope",
    }
    return GraniteMoeHybridConfig(**{**_without_head_dim(), **hybrid, **changes})


def qwen3_next(**changes: Any) -> PretrainedConfig:
    """A gated delta net before each attention layer, and experts. vLLM runs it in bf16, on GPUs and some CPUs."""
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return Qwen3NextConfig(**{**SHAPE, **GATED_DELTA_NETS, **experts, **changes})


def qwen3_5(**changes: Any) -> PretrainedConfig:
    """The text part: a gated delta net before each attention layer, without experts."""
    return Qwen3_5TextConfig(**{**SHAPE, **GATED_DELTA_NETS, **changes})


def jamba(**changes: Any) -> PretrainedConfig:
    """Mamba 1 before each attention layer; vLLM runs it on GPUs only."""
    hybrid = {
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "use_mamba_kernels": False,
    }
    return JambaConfig(**{**_without_head_dim(), **hybrid, **changes})


def _without_head_dim() -> dict[str, Any]:
    return {name: value for name, value in SHAPE.items() if name != "head_dim"}


def write(folder: Path, config: PretrainedConfig, tokenizer: Path) -> Path:
    """Writes a model with random weights and the tokenizer of another model.

    Args:
        folder: Destination.
        config: The model's configuration; weights are made in fp32 and saved in its `dtype`, if it has one.
        tokenizer: Folder with the tokenizer's files.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases are initialized to zeros and weights of norms to ones. With the latter, all keys after a QK-norm
            # would have equal norms, and rounding would choose the tokens.
            if parameter.dim() == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
    model.to(config.dtype or torch.float32).save_pretrained(folder)
    for file in TOKENIZER_FILES:
        if (tokenizer / file).exists():
            shutil.copy(tokenizer / file, folder)
    return folder


def write_eagle(folder: Path, config: PretrainedConfig) -> Path:
    """Writes an EAGLE head with random weights: a layer of the target's shape, with its embeddings and its output.

    Args:
        folder: Destination.
        config: The target's configuration, a Llama.

    Returns:
        The folder.
    """
    config, layer = _one_layer(config, "layers.0.", architectures=["LlamaForCausalLM"])
    weights = {name: weight for name, weight in layer.items() if "input_layernorm" not in name}
    weights["fc.weight"] = torch.randn(config.hidden_size, 2 * config.hidden_size) * config.initializer_range
    return _write_head(folder, config, weights)


def write_eagle3(folder: Path, config: PretrainedConfig) -> Path:
    """Writes an EAGLE-3 head with random weights, for the lower half of the target's vocabulary.

    Args:
        folder: Destination.
        config: The target's configuration, a Llama.

    Returns:
        The folder.
    """
    names = {"draft_vocab_size": config.vocab_size // 2, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    config, layer = _one_layer(config, "midlayer.", architectures=["LlamaForCausalLMEagle3"], **names)
    size = config.hidden_size

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape) * config.initializer_range

    # Queries, keys and values come from the token's embedding beside what `fc` makes of three hidden states.
    inputs = [f"midlayer.self_attn.{part}_proj.weight" for part in "qkv"]
    weights = {
        **layer,
        **{name: drawn(len(layer[name]), 2 * size) for name in inputs},
        "midlayer.hidden_norm.weight": torch.ones(size),
        "norm.weight": torch.ones(size),
        "fc.weight": drawn(size, 3 * size),
        "lm_head.weight": drawn(config.draft_vocab_size, size),
        "d2t": torch.zeros(config.draft_vocab_size, dtype=torch.long),
    }
    return _write_head(folder, config, weights)


def _one_layer(config: PretrainedConfig, prefix: str, **names: Any) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    """Returns the configuration of a head with one layer of the target's shape, and that layer's random weights."""
    torch.manual_seed(0)
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": 1, **names})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return config, model.model.layers[0].state_dict(prefix=prefix)


def _write_head(folder: Path, config: PretrainedConfig, weights: dict[str, torch.Tensor]) -> Path:
    save_file(weights, folder / "model.safetensors")
    config.save_pretrained(folder)
    return folder


def write_mtp(folder: Path, model: Path) -> Path:
    """Writes a model as MiMo, with a layer for the token after the next one, which has the weights of the last.

    Args:
        folder: Destination.
        model: Folder of the Qwen2.

    Returns:
        The folder.
    """
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(model)
    config.architectures, config.num_nextn_predict_layers = ["MiMoForCausalLM"], 1
    config.save_pretrained(folder)
    weights = load_file(model / "model.safetensors")
    last, added = f"model.layers.{config.num_hidden_layers - 1}.", "model.mtp_layers.0."
    weights |= {added + name.removeprefix(last): w.clone() for name, w in weights.items() if name.startswith(last)}
    size = config.hidden_size
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    weights |= {f"{added}{name}.weight": torch.ones(size) for name in norms}
    weights[f"{added}input_proj.weight"] = torch.cat([torch.eye(size), torch.eye(size)], dim=1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class HybridReference(Reference):
    """The reference for models with layers that hold a window of rows, or a state in place of rows."""

    def __init__(self, model: Path, **options: Any) -> None:
        super().__init__(model, **options)
        self.new_cache: Callable[[], DynamicCache] = lambda: DynamicCache(config=self.model.config)


class TokenwiseReference(HybridReference):
    """The reference for models whose states `transformers` loses when they continue with several tokens at once."""

    def _forward(
        self, cache: DynamicCache, tokens: Sequence[int], position: int, num_logits: int
    ) -> tuple[DynamicCache, torch.Tensor]:
        if position == 0:
            return super()._forward(cache, tokens, position, num_logits)
        rows = []
        for end in range(position, len(tokens)):
            cache, logits = super()._forward(cache, tokens[: end + 1], end, 1)
            rows.append(logits)
        return cache, torch.cat(rows[-num_logits:])


class WiderReference(HybridReference):
    """The reference for Cohere 2, whose windows are one token larger in vLLM than in `transformers`."""

    def __init__(self, model: Path, **options: Any) -> None:
        super().__init__(model, **options)
        self.model.config.sliding_window += 1
        for layer in self.model.model.layers:
            if layer.self_attn.sliding_window is not None:
                layer.self_attn.sliding_window += 1


class ChunkedReference(HybridReference):
    """The reference for models with layers that attend to one chunk of the text."""

    def _more(self, position: int) -> dict[str, Any]:
        return {"first_position": position}
