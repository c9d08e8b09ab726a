"""Made-up models some of whose layers hold the end of a context only."""

import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

STATE = "state"
Layer = int | tuple[int] | str | None
"""`None` attends to everything, a number is a sliding window, one in brackets a chunk, `STATE` keeps a state."""


def specs(layers: tuple[Layer, ...], block_size: int) -> tuple[tuple[str, KVCacheSpec], ...]:
    """Items of the specs that vLLM finds in such a model, for `bare_scheduler.plan`."""
    shape = {"block_size": block_size, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}

    def spec_of(layer: Layer) -> KVCacheSpec:
        if layer is None:
            return FullAttentionSpec(**shape)
        if layer == STATE:
            return MambaSpec(
                block_size=block_size,
                shapes=((8, 8),),
                dtypes=(torch.float32,),
                page_size_padded=FullAttentionSpec(**shape).page_size_bytes,
                mamba_cache_mode="align",
            )
        if isinstance(layer, int):
            return SlidingWindowSpec(**shape, sliding_window=layer)
        assert isinstance(layer, tuple)
        return ChunkedLocalAttentionSpec(**shape, attention_chunk_size=layer[0])

    return tuple((f"model.layers.{i}.self_attn", spec_of(layer)) for i, layer in enumerate(layers))
