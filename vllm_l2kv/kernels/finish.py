"""Turns raw scores into selection keys, after pooling them over neighbors, or over blocks of tokens and heads."""

import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import NUM_ROWS, ROW_LENGTH, Batch, scores_begin, selection_keys
from vllm_l2kv.params import NEIGHBORS, TOKENS_PER_BLOCK

ROWS = 512
"""Rows per tile; a multiple of `TOKENS_PER_BLOCK`, and more than `NEIGHBORS`."""


def finish(batch: Batch, scores: torch.Tensor, granularity: str) -> None:
    """Replaces scores by `batch.selection_keys` of `token_groups.pool_scores`, in place.

    Args:
        batch: The orders.
        scores: The raw scores of `scores.Scored.write`.
        granularity: One of `vllm_l2kv.params.GRANULARITIES`.
    """
    of_layers, num_selections, num_orders = batch.cache.of_layers, batch.cache.num_selections, len(batch.rows)
    if granularity == "block":
        _blocks_kernel[(triton.cdiv(batch.longest, ROWS), of_layers.shape[0] - 1, num_orders)](
            batch.table, scores, of_layers, num_selections, TOKENS=TOKENS_PER_BLOCK, ROWS=ROWS
        )
    else:
        beside = NEIGHBORS if granularity == "neighbors" else 0
        _neighbors_kernel[(num_selections, num_orders)](batch.table, scores, num_selections, beside, ROWS)


@triton.jit(do_not_specialize=["num_selections"])
def _neighbors_kernel(
    table,  # [num_orders * ROW_LENGTH + num_blocks] int32
    scores,  # [num_selections * num_rows], fp32 before and int32 after
    num_selections,
    NEIGHBORS: tl.constexpr,  # rows on each side that count
    ROWS: tl.constexpr,
):
    i_selection, i_order = tl.program_id(0), tl.program_id(1)
    order = table + i_order * ROW_LENGTH
    num_rows = tl.load(order + NUM_ROWS)
    first = scores + scores_begin(order, i_selection, num_selections, num_rows)
    o_tile = tl.arange(0, ROWS)
    b_key = tl.zeros([ROWS], tl.int32)
    # One program walks over all rows, since tiles share neighbors. A tile is stored once the next one has read them.
    for start in range(0, num_rows + ROWS, ROWS):
        o_row = start + o_tile
        b_sum, b_count = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.int32)
        for offset in tl.static_range(-NEIGHBORS, NEIGHBORS + 1):
            m_row = (o_row + offset >= 0) & (o_row + offset < num_rows)
            b_bits = tl.load(first + o_row + offset, mask=m_row, other=0)
            b_sum += b_bits.to(tl.float32, bitcast=True).to(tl.float64)
            b_count += m_row.to(tl.int32)
        b_next = selection_keys((b_sum / tl.maximum(b_count, 1)).to(tl.float32), order, o_row, num_rows)
        tl.debug_barrier()  # all threads have read their neighbors
        o_before = o_row - ROWS
        tl.store(first + o_before, b_key, mask=(o_before >= 0) & (o_before < num_rows))
        b_key = b_next


@triton.jit(do_not_specialize=["num_selections"])
def _blocks_kernel(
    table,  # [num_orders * ROW_LENGTH + num_blocks] int32
    scores,  # [num_selections * num_rows], fp32 before and int32 after
    of_layers,  # [num_layers + 1] int32
    num_selections,
    TOKENS: tl.constexpr,  # number of tokens that share a score, with all heads of a layer
    ROWS: tl.constexpr,
):
    i_tile, i_layer, i_order = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    order = table + i_order * ROW_LENGTH
    num_rows = tl.load(order + NUM_ROWS)
    if i_tile * ROWS >= num_rows:
        return
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_row < num_rows
    first_head = tl.load(of_layers + i_layer)
    num_heads = tl.load(of_layers + i_layer + 1) - first_head
    first = scores + scores_begin(order, first_head, num_selections, num_rows)
    # In fp64, as in the reference: the order of summation does not change the fp32 result.
    b_sum = tl.zeros([ROWS], tl.float64)
    of_head = first
    for _ in range(num_heads):
        b_bits = tl.load(of_head + o_row, mask=m_row, other=0)
        b_sum += b_bits.to(tl.float32, bitcast=True).to(tl.float64)
        of_head += num_rows
    b_sum = tl.reshape(b_sum / num_heads, [ROWS // TOKENS, TOKENS])
    b_count = tl.reshape(m_row.to(tl.int32), [ROWS // TOKENS, TOKENS])
    b_mean = tl.sum(b_sum, axis=1) / tl.maximum(tl.sum(b_count, axis=1), 1)
    b_score = tl.reshape(tl.broadcast_to(b_mean[:, None], [ROWS // TOKENS, TOKENS]), [ROWS]).to(tl.float32)
    b_key = selection_keys(b_score, order, o_row, num_rows)
    of_head = first
    for _ in range(num_heads):
        tl.store(of_head + o_row, b_key, mask=m_row)
        of_head += num_rows
