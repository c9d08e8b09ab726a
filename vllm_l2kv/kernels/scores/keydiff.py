"""The kernels of `keydiff`: partial sums of unit keys, then the mean direction, then cosines."""

import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import FIRST_SCORE, NUM_ROWS, ROW_LENGTH, Batch, load_part, row_pointers
from vllm_l2kv.kernels.one_pass import one_pass
from vllm_l2kv.scorers import Scorer

PART = 1024
"""Rows that one program adds up."""
TILE = 8192
"""Elements that one program reads at once."""
SMALLEST_NORM, SMALLEST_FACTOR = tl.constexpr(1e-12), tl.constexpr(1e-8)
"""Smallest divisors of `torch.nn.functional.normalize` and `cosine_similarity`."""


def work_numbers(num_orders: int, num_selections: int, num_rows: int, head_size: int) -> int:
    """32-bit numbers of work memory that a batch needs."""
    num_parts = num_rows // PART + 2 * num_orders  # each order has a mean, and may have a short last part
    padded: int = triton.next_power_of_2(head_size)
    return num_parts * num_selections * padded


@triton.jit
def score(
    rows, o_row, num_rows, i_selection, i_order, extra, SHAPE: tl.constexpr,
    KEY: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """`-cos(k, anchor)`."""
    (anchors,) = extra
    o_dim = tl.arange(0, KEY_PADDED)
    o_anchor = (i_order.to(tl.int64) * SHAPE[0] + i_selection) * KEY_PADDED
    b_anchor = tl.load(anchors + o_anchor + o_dim)
    b_key = load_part(rows, o_row < num_rows, 0, KEY, KEY_PADDED)
    b_norm = tl.sqrt_rn(tl.sum(b_key * b_key, axis=1))
    return -tl.sum(b_key * b_anchor[None, :], axis=1) / tl.maximum(b_norm, SMALLEST_FACTOR)


class Kernels:
    """Two passes over keys, with a sum between them. The order of summation is fixed, so scores are reproducible."""

    def __init__(self, scorer: Scorer) -> None:
        """Ignores the scorer, which has no parameters."""

    def write(self, batch: Batch, out: torch.Tensor, work: torch.Tensor, raw: bool) -> None:
        """See `scores.Scored`."""
        anchors = _anchors(batch, work.view(torch.float32))
        one_pass(score, batch, out, raw=raw, extra=(anchors,), shape=(batch.cache.num_selections,))


def _anchors(batch: Batch, work: torch.Tensor) -> torch.Tensor:
    """Direction of each selection's mean unit key: `[num_orders * num_selections * KEY_PADDED]` fp32, in `work`."""
    cache = batch.cache
    num_orders, num_selections, padded = len(batch.rows), cache.num_selections, triton.next_power_of_2(cache.head_size)
    sums = work[num_orders * num_selections * padded :]
    _sum_kernel[(triton.cdiv(batch.longest, PART), num_selections, num_orders)](
        cache.pointers, cache.like, batch.table, sums, *cache.strides, cache.block_size,
        KEY=cache.head_size, KEY_PADDED=padded, PART=PART, ROWS=TILE // padded,
    )  # fmt: skip
    _mean_kernel[(num_selections, num_orders)](batch.table, sums, work, KEY_PADDED=padded, PART=PART, num_warps=1)
    return work


@triton.jit
def _first_part(order, i_order, PART: tl.constexpr):
    """Index of an order's first part, after the parts of all earlier orders."""
    return (tl.load(order + FIRST_SCORE) // PART + i_order).to(tl.int64)


@triton.jit
def _sum_kernel(
    pointers,  # [num_selections] int64
    like,  # a tensor of the keys' type
    table,  # [num_orders * ROW_LENGTH + num_blocks] int32
    sums,  # [num_parts, num_selections, KEY_PADDED] fp32
    stride_block,
    stride_slot,
    block_size,
    KEY: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_part, i_selection, i_order = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    order = table + i_order * ROW_LENGTH
    num_rows = tl.load(order + NUM_ROWS)
    if i_part * PART >= num_rows:
        return
    b_sum = tl.zeros([ROWS, KEY_PADDED], tl.float32)
    end = tl.minimum((i_part + 1) * PART, num_rows)
    for start in range(i_part * PART, end, ROWS):
        o_row = start + tl.arange(0, ROWS)
        m_row = o_row < end
        rows = row_pointers(
            pointers, like, order, table, i_selection, o_row, m_row, stride_block, stride_slot, block_size
        )  # fmt: skip
        b_key = load_part(rows, m_row, 0, KEY, KEY_PADDED)
        b_norm = tl.sqrt_rn(tl.sum(b_key * b_key, axis=1))
        b_sum += b_key * (1.0 / tl.maximum(b_norm, SMALLEST_NORM))[:, None]
    part = (_first_part(order, i_order, PART) + i_part) * tl.num_programs(1) + i_selection
    tl.store(sums + part * KEY_PADDED + tl.arange(0, KEY_PADDED), tl.sum(b_sum, axis=0))


@triton.jit
def _mean_kernel(
    table,  # [num_orders * ROW_LENGTH + num_blocks] int32
    sums,  # [num_parts, num_selections, KEY_PADDED] fp32
    anchors,  # [num_orders, num_selections, KEY_PADDED] fp32
    KEY_PADDED: tl.constexpr,
    PART: tl.constexpr,
):
    i_selection, i_order = tl.program_id(0), tl.program_id(1)
    num_selections = tl.num_programs(0)
    order = table + i_order * ROW_LENGTH
    num_rows = tl.load(order + NUM_ROWS)
    o_dim = tl.arange(0, KEY_PADDED)
    part = sums + (_first_part(order, i_order, PART) * num_selections + i_selection) * KEY_PADDED + o_dim
    b_sum = tl.zeros([KEY_PADDED], tl.float32)
    for _ in range(0, num_rows, PART):
        b_sum += tl.load(part)
        part += num_selections * KEY_PADDED
    b_mean = b_sum / num_rows
    b_norm = tl.maximum(tl.sqrt_rn(tl.sum(b_mean * b_mean, axis=0)), SMALLEST_FACTOR)
    o_anchor = (i_order.to(tl.int64) * num_selections + i_selection) * KEY_PADDED
    tl.store(anchors + o_anchor + o_dim, b_mean / b_norm)
