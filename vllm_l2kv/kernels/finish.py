"""Turns raw scores into selection keys, after pooling them over blocks of tokens and heads if asked for."""

import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import NUM_ROWS, ROW_LENGTH, Batch, scores_begin, selection_keys
from vllm_l2kv.params import TOKENS_PER_BLOCK

ROWS = 512
"""Rows per tile; a multiple of `TOKENS_PER_BLOCK`."""


def finish(batch: Batch, scores: torch.Tensor, granularity: str) -> None:
    """Replaces scores by `batch.selection_keys` of `token_groups.pool_scores`, in place.

    Args:
        batch: The orders.
        scores: The raw scores of `scores.Scored.write`.
        granularity: One of `vllm_l2kv.params.GRANULARITIES`.
    """
    num_selections, of_layers = batch.cache.num_selections, batch.cache.of_layers
    is_block = granularity == "block"
    num_groups = of_layers.shape[0] - 1 if is_block else num_selections
    _finish_kernel[(triton.cdiv(batch.longest, ROWS), num_groups, len(batch.rows))](
        batch.table, scores, of_layers, num_selections,
        TOKENS=TOKENS_PER_BLOCK if is_block else 1, ROWS=ROWS, BY_LAYER=is_block,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_selections"])
def _finish_kernel(
    table,  # [num_orders * ROW_LENGTH + num_blocks] int32
    scores,  # [num_selections * num_rows], fp32 before and int32 after
    of_layers,  # [num_layers + 1] int32
    num_selections,
    TOKENS: tl.constexpr,  # number of tokens that share a score
    ROWS: tl.constexpr,
    BY_LAYER: tl.constexpr,  # whether the heads of a layer share a score too
):
    i_tile, i_group, i_order = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    order = table + i_order * ROW_LENGTH
    num_rows = tl.load(order + NUM_ROWS)
    if i_tile * ROWS >= num_rows:
        return
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_row < num_rows
    first_head, num_heads = i_group, 1
    if BY_LAYER:
        first_head = tl.load(of_layers + i_group)
        num_heads = tl.load(of_layers + i_group + 1) - first_head
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
