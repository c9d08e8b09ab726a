"""A single pass over the rows of a batch that scores each row independently."""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import NUM_ROWS, ROW_LENGTH, Batch, row_pointers, scores_begin, selection_keys

ROWS = 32
"""Rows per tile, unless the scorer sets another number."""


def one_pass(
    score: Any,
    batch: Batch,
    out: torch.Tensor,
    *,
    raw: bool,
    extra: tuple[torch.Tensor, ...] = (),
    shape: tuple[int, ...] = (),
    rows: int | None = None,
    num_warps: int = 4,
    selections: range | None = None,
) -> None:
    """Scores every row.

    Args:
        score: A Triton function that returns the scores of a tile: `[rows]` fp32. Its arguments are

            - `rows`: `[rows]` addresses of the tile's rows; a row holds the key, then the value;
            - `o_row`: `[rows]` indices of the rows; those from `num_rows` on are padding;
            - `num_rows`: number of rows of the order;
            - `i_selection`, `i_order`: indices of the selection and the order;
            - `extra`, `SHAPE`: see below;
            - `KEY`, `KEY_PADDED`, `VALUE`, `VALUE_PADDED`: elements of a key and a value, and the next powers of two.
        batch: The orders.
        out: See `scores.Scored.write`; scores of `selections`.
        raw: See `scores.Scored.write`.
        extra: Other tensors that the function reads.
        shape: Compile-time constants of the function.
        rows: Rows per tile; `None` for `ROWS`.
        num_warps: Warps per program.
        selections: Score only these layers and heads of each order; `None` for all.
    """
    cache = batch.cache
    selections = selections or range(cache.num_selections)
    tile = rows or ROWS
    _score_kernel[(triton.cdiv(batch.longest, tile), len(selections), len(batch.rows))](
        cache.pointers, cache.like, batch.table, out, *cache.strides, cache.block_size,
        selections.start, int(raw), extra, score, shape,
        KEY=cache.head_size, KEY_PADDED=triton.next_power_of_2(cache.head_size),
        VALUE=cache.value_size, VALUE_PADDED=triton.next_power_of_2(cache.value_size),
        ROWS=tile, num_warps=num_warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_selection", "raw"])
def _score_kernel(
    pointers,  # [num_selections] int64
    like,  # a tensor of the rows' type
    table,  # [num_orders * ROW_LENGTH + num_blocks] int32
    out,  # [num_selections * num_rows] int32
    stride_block,
    stride_slot,
    block_size,
    first_selection,
    raw,
    extra,
    SCORE: tl.constexpr,
    SHAPE: tl.constexpr,
    KEY: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_tile, i_selection, i_order = tl.program_id(0), first_selection + tl.program_id(1), tl.program_id(2)
    order = table + i_order * ROW_LENGTH
    num_rows = tl.load(order + NUM_ROWS)
    if i_tile * ROWS >= num_rows:
        return
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_row < num_rows
    rows = row_pointers(
        pointers, like, order, table, i_selection, o_row, m_row, stride_block, stride_slot, block_size
    )  # fmt: skip
    b_score = SCORE(
        rows, o_row, num_rows, i_selection, i_order, extra, SHAPE, KEY, KEY_PADDED, VALUE, VALUE_PADDED
    )  # fmt: skip
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_out = tl.where(raw != 0, b_bits, selection_keys(b_score, order, o_row, num_rows))
    o_out = scores_begin(order, tl.program_id(1), tl.num_programs(1), num_rows) + o_row
    tl.store(out + o_out, b_out, mask=m_row)
