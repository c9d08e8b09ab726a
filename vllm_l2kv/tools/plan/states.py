"""What a recurrent layer keeps of a request, by vLLM's own classes of models."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import CacheConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.v1.kv_cache_interface import MambaSpec


def state_of(config: Any, text: Any, dtype: torch.dtype, num_gpus: int) -> MambaSpec:
    """The state of a layer on one GPU, in a block of one token.

    Args:
        config: Of the model.
        text: The part of it that is about text.
        dtype: Of activations.
        num_gpus: Tensor-parallel size.

    Raises:
        ValueError: vLLM does not know the model, or its config lacks something.
    """
    architecture = next(iter(config.architectures or ()), "")
    # What these functions of vLLM's read of an engine's configuration.
    engine = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, hf_text_config=text, dtype=dtype, architecture=architecture),
        cache_config=CacheConfig(),
        parallel_config=SimpleNamespace(tensor_parallel_size=num_gpus),
        speculative_config=None,
        num_speculative_tokens=0,
    )
    try:
        if architecture in MODELS_CONFIG_MAP:  # some have a type of their own for states
            MODELS_CONFIG_MAP[architecture].verify_and_update_config(engine)
        model: Any = ModelRegistry.models[architecture].load_model_cls()
        shapes = model.get_mamba_state_shape_from_config(engine)
        dtypes = model.get_mamba_state_dtype_from_config(engine)
    except (AttributeError, ImportError, KeyError) as error:
        raise ValueError(
            f"vLLM does not say what a recurrent layer of {architecture or config.model_type} keeps: {error}"
        ) from error
    return MambaSpec(block_size=1, shapes=tuple(shapes), dtypes=tuple(dtypes))
