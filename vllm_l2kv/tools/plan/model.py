"""Reads a model's KV cache from its config, and the size of its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError
from transformers import AutoModelForCausalLM
from vllm.config.model import MODEL_ARCH_CONFIG_CONVERTORS, ModelArchConfigConvertorBase
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.utils import extract_layer_index
from vllm.transformers_utils.config import get_config, get_hf_text_config
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    get_kv_quant_mode,
)

from vllm_l2kv.profile import FULL_ATTENTION, RECURRENT, SLIDING_ATTENTION, WITHOUT_CACHE, Shape
from vllm_l2kv.refusals import check_kv_heads
from vllm_l2kv.tools.plan.states import state_of

STORED_FLOATS = ("BF16", "F16", "F32")
"""Types in safetensors that vLLM converts to the model's dtype; other types, of quantized weights, are kept."""
UNEVEN = ("global_head_dim", "num_global_key_value_heads", "num_kv_shared_layers")
"""Entries of configs whose attention layers differ in more than the window."""


@dataclass(frozen=True)
class Model:
    """A decoder whose attention layers have equal caches, apart from windows.

    Attributes:
        layer_types: Type of each layer, as `transformers` names it.
        window: Tokens of the sliding windows; `None` for none.
        num_heads: Query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_size: Elements of a key, and of a value.
        dtype: Type of weights and activations.
        state_of: Takes the tensor-parallel size and returns the spec of a recurrent layer's state on one GPU.
    """

    layer_types: tuple[str, ...]
    window: int | None
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    state_of: Callable[[int], MambaSpec]

    @property
    def shape(self) -> Shape:
        """The `Shape` that a profile of this model has."""
        return Shape(len(self.layer_types), self.num_kv_heads, self.head_size, self.layer_types)

    def specs(self, block_size: int, kv_cache_dtype: str, num_gpus: int) -> dict[str, KVCacheSpec]:
        """vLLM's specs of the layers on one GPU, as its workers would make them with a prefix cache.

        Args:
            block_size: Tokens per block; with recurrent layers, the least number.
            kv_cache_dtype: `auto`, `fp8` or `fp8_e4m3`.
            num_gpus: Tensor-parallel size; KV heads are divided among the GPUs, or replicated if there are fewer.

        Raises:
            ValueError: Heads cannot be divided, or vLLM does not know the recurrent layers.
        """
        if self.num_heads % num_gpus:
            raise ValueError(f"--tensor-parallel-size must divide the model's {self.num_heads} heads, got {num_gpus}.")
        check_kv_heads(self.num_kv_heads, num_gpus)
        cache: dict[str, Any] = {
            "num_kv_heads": max(1, self.num_kv_heads // num_gpus),
            "head_size": self.head_size,
            "dtype": self.dtype if kv_cache_dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[kv_cache_dtype],
            "kv_quant_mode": get_kv_quant_mode(kv_cache_dtype),
        }
        rows = FullAttentionSpec(block_size=block_size, **cache)
        of_type: dict[str, KVCacheSpec] = {}
        if not RECURRENT.isdisjoint(self.layer_types):
            rows, state = blocks_of_equal_bytes(rows, self.state_of(num_gpus))
            of_type |= dict.fromkeys(RECURRENT, state)
        of_type[FULL_ATTENTION] = rows
        if self.window is not None:
            window = SlidingWindowSpec(block_size=rows.block_size, sliding_window=self.window, **cache)
            of_type[SLIDING_ATTENTION] = window
        return {f"layers.{i}.attn": of_type[kind] for i, kind in enumerate(self.layer_types) if kind in of_type}


def of_pipeline_ranks(
    specs: Mapping[str, KVCacheSpec], num_layers: int, num_ranks: int
) -> list[dict[str, KVCacheSpec]]:
    """Specs of each pipeline rank, to which vLLM gives adjacent layers.

    Args:
        specs: From `Model.specs`.
        num_layers: Layers of the model, with a cache or without.
        num_ranks: Pipeline-parallel size.

    Raises:
        ValueError: A rank would have no layer with a cache.
    """
    bounds = [get_pp_indices(num_layers, rank, num_ranks) for rank in range(num_ranks)]
    ranks = [
        {name: spec for name, spec in specs.items() if first <= extract_layer_index(name) < end}
        for first, end in bounds
    ]
    if not all(ranks):
        raise ValueError(
            f"--pipeline-parallel-size must leave a layer with a cache to each rank; of {num_layers} layers "
            f"{len(specs)} have one, got {num_ranks} ranks."
        )
    return ranks


def blocks_of_equal_bytes(rows: FullAttentionSpec, state: MambaSpec) -> tuple[FullAttentionSpec, MambaSpec]:
    """Blocks of equal bytes for rows and states, as vLLM makes them with a prefix cache: the smallest that fit a state.

    Args:
        rows: Spec of an attention layer with the smallest blocks.
        state: Spec of a recurrent layer.
    """
    rows = replace(rows, block_size=rows.block_size * -(-state.page_size_bytes // rows.page_size_bytes))
    padded = replace(state, block_size=rows.block_size, page_size_padded=rows.page_size_bytes, mamba_cache_mode="align")
    return rows, padded


def read_config(name: str) -> Any:
    """Reads the config of a model: a folder, or a name on the Hugging Face hub.

    Raises:
        ValueError: The config cannot be read.
    """
    try:
        return get_config(name, trust_remote_code=False, config_format="hf")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read the config of {name}: {' '.join(str(error).split())}") from error


def model_of(config: Any, dtype: str) -> Model:
    """Reads a `Model` from its config.

    Args:
        config: Config from `read_config`.
        dtype: Value of vLLM's `--dtype`.

    Raises:
        ValueError: The model cannot be compressed, or this module does not know its layers.
    """
    text = get_hf_text_config(config)
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)(config, text)
    if convertor.is_deepseek_mla() or config.is_encoder_decoder:
        raise ValueError("models with MLA and encoder-decoder models cannot be compressed.")
    if uneven := [name for name in UNEVEN if getattr(text, name, None)]:
        raise ValueError(f"its config has {uneven[0]}: plan does not support layers with caches of several shapes.")
    stored: torch.dtype = convertor.get_torch_dtype(config, "", None, "hf")
    # By default, vLLM runs models that are stored in fp32 in bf16.
    automatic = torch.bfloat16 if stored == torch.float32 else stored
    return Model(
        layer_types=_layer_types(text, convertor.get_num_hidden_layers()),
        window=getattr(text, "sliding_window", None),
        num_heads=convertor.get_total_num_attention_heads(),
        num_kv_heads=convertor.get_total_num_kv_heads(),
        head_size=convertor.get_head_size(),
        dtype=(computed := automatic if dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[dtype]),
        state_of=partial(state_of, config, text, computed),
    )


def _layer_types(text: Any, num_layers: int) -> tuple[str, ...]:
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None) or [SLIDING_ATTENTION if window else FULL_ATTENTION] * num_layers
    if strange := set(types) - {FULL_ATTENTION, SLIDING_ATTENTION} - RECURRENT - WITHOUT_CACHE:
        raise ValueError(f"its config has layers of type {min(strange)}, which plan does not support.")
    return tuple(types)


def weight_bytes(name: str, config: Any, dtype: torch.dtype) -> tuple[int, str]:
    """Bytes of all weights in memory, and the source of the number.

    Args:
        name: Folder of the model; weights on the hub are not read.
        config: The model's config.
        dtype: Type in which floating-point weights are loaded.

    Raises:
        ValueError: Neither files nor config give the number.
    """
    try:
        files = get_local_safetensors_metadata(Path(name)).files_metadata.values()
    except (NotASafetensorsRepoError, OSError):
        return _counted_bytes(config, dtype), "parameters counted by the config"
    tensors = [tensor for file in files for tensor in file.tensors.values()]
    sizes = (
        tensor.parameter_count * dtype.itemsize
        if tensor.dtype in STORED_FLOATS
        else tensor.data_offsets[1] - tensor.data_offsets[0]
        for tensor in tensors
    )
    return sum(sizes), "headers of the safetensors files"


def _counted_bytes(config: Any, dtype: torch.dtype) -> int:
    if getattr(config, "quantization_config", None) or get_hf_text_config(config) is not config:
        raise ValueError(
            "argument --weights-gib: must be given, since the model's config does not tell the size of its weights."
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_parameters: int = sum(parameter.numel() for parameter in model.parameters())
    return dtype.itemsize * num_parameters
