"""The state that a recurrent layer keeps for a request, from vLLM's model classes."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import CacheConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.v1.kv_cache_interface import MambaSpec


def state_of(config: Any, text: Any, dtype: torch.dtype, num_gpus: int) -> MambaSpec:
    """The spec of a layer's state on one GPU, with a block size of one token.

    Args:
        config: The model's config.
        text: The part of the config that describes the language model.
        dtype: Type of activations.
        num_gpus: Tensor-parallel size.

    Raises:
        ValueError: vLLM does not know the model, or an entry is missing in its config.
    """
    architecture = next(iter(config.architectures or ()), "")
    # The parts of an engine's configuration that these functions of vLLM read.
    engine = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, hf_text_config=text, dtype=dtype, architecture=architecture),
        cache_config=CacheConfig(),
        parallel_config=SimpleNamespace(tensor_parallel_size=num_gpus),
        speculative_config=None,
        num_speculative_tokens=0,
    )
    try:
        if architecture in MODELS_CONFIG_MAP:  # some models set the dtype of states there
            MODELS_CONFIG_MAP[architecture].verify_and_update_config(engine)
        model: Any = ModelRegistry.models[architecture].load_model_cls()
        shapes = model.get_mamba_state_shape_from_config(engine)
        dtypes = model.get_mamba_state_dtype_from_config(engine)
    except (AttributeError, ImportError, KeyError) as error:
        raise ValueError(
            f"vLLM has no state of recurrent layers for {architecture or config.model_type}: {error}"
        ) from error
    return MambaSpec(block_size=1, shapes=tuple(shapes), dtypes=tuple(dtypes))
