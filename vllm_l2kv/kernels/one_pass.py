"""A pass over the rows of a batch that gives each a score by itself."""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import NUM_ROWS, ROW_LENGTH, Batch, row_pointers, scores_begin, selection_keys

ROWS = 32
"""Rows of a tile, where a scorer names no other number."""


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
        score: A Triton function that returns the scores of a tile: `[rows]` fp32. It is given

            - `rows`: addresses of the tile's rows, `[rows]`; a row holds the key, then the value;
            - `o_row`: their places, `[rows]`; those from `num_rows` on are none;
            - `num_rows`: rows of the order;
            - `i_selection`, `i_order`: whose rows they are;
            - `extra`, `SHAPE`: as below;
            - `KEY`, `KEY_PADDED`, `VALUE`, `VALUE_PADDED`: sizes of a key and a value, and powers of two for them.
        batch: The orders.
        out: As of `scores.Scored.write`, of `selections`.
        raw: As of `scores.Scored.write`.
        extra: What else the function reads.
        shape: Numbers that it knows when it is compiled.
        rows: Rows of a tile; `None` for `ROWS`.
        num_warps: Warps of a program.
        selections: Of each order, these layers and heads only; `None` for all.
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
