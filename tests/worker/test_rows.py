"""The views of a CPU cache against rows that vLLM's own kernel writes."""

import pytest
import torch

from vllm_l2kv.kv_cache_spec import CompressedLayerSpec
from vllm_l2kv.worker.cpu import check_cpu_layout
from vllm_l2kv.worker.rows import cpu_rows


def spec(dtype: torch.dtype, head_size: int, block_size: int, num_kv_heads: int = 3) -> CompressedLayerSpec:
    return CompressedLayerSpec(block_size=block_size, num_kv_heads=num_kv_heads, head_size=head_size, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [32, 64, 80, 128, 256])
def test_views_read_what_the_kernel_writes(dtype, head_size):
    isa = "vec" if head_size % 32 == 0 else "vec16"
    check_cpu_layout(isa, spec(dtype, head_size, 32))
    check_cpu_layout(isa, spec(dtype, head_size, 448))


def test_views_write_through():
    cache = torch.zeros(4, 2, 32, 2 * 16)
    rows = cpu_rows(cache, 16)
    rows.keys[1, 0, 3] = 1.0
    rows.values[2, 1, 5] = 2.0
    assert (cache == 1).sum() == 16
    assert (cache == 2).sum() == 16
    assert cache[1, 0].any()
    assert cache[2, 1].any()


def test_views_follow_block_outermost_strides():
    """In a packed pool, pages of other layers lie between the blocks of one layer."""
    pool = torch.randn(5, 7, 2, 32, 2 * 16)  # [num_blocks, num_layers, num_kv_heads, block_size, content]
    rows = cpu_rows(pool[:, 3], 16)
    compact = cpu_rows(pool[:, 3].clone(), 16)
    assert torch.equal(rows.keys, compact.keys)
    assert torch.equal(rows.values, compact.values)
    assert rows.keys.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()
