"""Views of a layer's cache as rows: where the key and the value of a slot are in memory."""

import torch

from vllm_l2kv.kernels.reference import LayerRows


def cpu_rows(kv_cache: torch.Tensor, head_size: int) -> LayerRows:
    """Rows of a cache that vLLM's CPU kernels `vec` and `vec16` write.

    For each (block, head) the first half holds the transposed keys, `[head_size, block_size]`, and the second half the
    values, `[block_size, head_size]`.

    Args:
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`; the last two dimensions contiguous.
        head_size: Elements of a key, and of a value.

    Returns:
        Views into `kv_cache`.
    """
    num_blocks, num_kv_heads, block_size, content = kv_cache.shape
    assert content == 2 * head_size
    keys, values = kv_cache.flatten(2).chunk(2, dim=2)  # [num_blocks, num_kv_heads, block_size * head_size]
    return LayerRows(
        keys.view(num_blocks, num_kv_heads, head_size, block_size).transpose(2, 3),
        values.view(num_blocks, num_kv_heads, block_size, head_size),
    )
