"""Shapes of real models with recurrent layers."""

from typing import NamedTuple

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec


class Shape(NamedTuple):
    """A model: a letter for each layer (M recurrent, * attention, - without a cache), and the sizes of their caches."""

    kinds: str
    num_kv_heads: int
    head_size: int
    state: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    def specs(self, has_prefix_cache: bool, max_model_len: int = 4096) -> dict:
        """Returns specs as vLLM makes them: attention blocks not smaller than a state, and states padded to them."""
        shapes, dtypes = zip(*self.state, strict=True)
        attention = {"num_kv_heads": self.num_kv_heads, "head_size": self.head_size, "dtype": torch.bfloat16}
        state_bytes = MambaSpec(block_size=1, shapes=shapes, dtypes=dtypes).page_size_bytes
        block_size = 16 * cdiv(state_bytes, FullAttentionSpec(block_size=16, **attention).page_size_bytes)
        rows = FullAttentionSpec(block_size=block_size, **attention)
        state = MambaSpec(
            block_size=block_size if has_prefix_cache else max_model_len,
            shapes=shapes,
            dtypes=dtypes,
            page_size_padded=rows.page_size_bytes,
            mamba_cache_mode="align" if has_prefix_cache else "none",
        )
        of_kind = {"M": state, "*": rows}
        return {f"model.layers.{i}.x": of_kind[kind] for i, kind in enumerate(self.kinds) if kind != "-"}


BF16, FP32 = torch.bfloat16, torch.float32
MODELS = {
    "Qwen3-Next-80B": Shape("MMM*" * 12, 2, 256, (((3, 8192), BF16), ((32, 128, 128), BF16))),
    "Qwen3.5-27B": Shape("MMM*" * 16, 4, 256, (((3, 10240), BF16), ((48, 128, 128), FP32))),
    "Nemotron-H-8B": Shape(
        "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-", 8, 128, (((3, 10240), BF16), ((128, 64, 128), FP32))
    ),
    "Jamba-1.5-Mini": Shape("MMMM*MMM" * 4, 8, 128, (((3, 8192), BF16), ((8192, 16), BF16))),
    "LFM2-1.2B": Shape("MM*MM*MM*M*M*M*M", 8, 64, (((2, 2048), BF16),)),
    "Granite-4-Tiny": Shape(
        "MMMMM*MMMMMMMMM*MMMMMMMMM*MMMMMMMMM*MMMM", 4, 128, (((3, 3328), BF16), ((48, 64, 128), BF16))
    ),
}
