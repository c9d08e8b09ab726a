"""Ranks of scores by a radix sort, with one program for each selection."""

import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import NUM_ROWS, ROW_LENGTH, Batch, descending, scores_begin, selection_keys

TILE = 1024
"""Scores that a program sorts at once; small enough that two programs fit on a multiprocessor."""
BUFFERS = 4
"""32-bit numbers of work memory that ranking needs for each row of a selection."""
MOST_BYTES = 128 << 20
"""Limit of the work memory in bytes, unless a single selection needs more."""


def work_numbers(num_selections: int, num_rows: int) -> int:
    """32-bit numbers of work memory: for as many selections at a time as fit in `MOST_BYTES`."""
    return BUFFERS * num_rows * max(1, min(num_selections, MOST_BYTES // (4 * BUFFERS * num_rows)))


def selections_at_once(batch: Batch, work: torch.Tensor) -> list[range]:
    """All selections, in parts that fit in `work`."""
    size = min(work.numel() // (BUFFERS * batch.num_rows), batch.cache.num_selections)
    return [range(first, first + size) for first in range(0, batch.cache.num_selections, size)]


def add_ranks(batch: Batch, out: torch.Tensor, work: torch.Tensor, selections: range, raw: bool) -> None:
    """Adds the ranks of two scores, each truncated to bf16.

    The lowest score of a selection has rank 0. Of equal scores the one of the earlier row ranks higher; NaN ranks
    lowest.

    Args:
        batch: The orders.
        out: The first scores of all selections, raw; those of `selections` are replaced by the sums, in the form of
            `scores.Scored.write`.
        work: `BUFFERS` numbers for each row of `selections`; begins with their second scores, raw.
        selections: Layers and heads of each order.
        raw: See `scores.Scored.write`.
    """
    _rank_kernel[(len(selections), len(batch.rows))](
        batch.table, out, work, selections.start, batch.cache.num_selections, len(selections) * batch.num_rows,
        int(raw), TILE=TILE, num_warps=max(TILE // 128, 1),
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_selection", "num_selections", "size", "raw"])
def _rank_kernel(
    table,  # [num_orders * ROW_LENGTH + num_blocks] int32
    scores,  # [num_selections * num_rows] int32
    work,  # [4, size] int32
    first_selection,
    num_selections,
    size,
    raw,
    TILE: tl.constexpr,
):
    i_selection, i_order = tl.program_id(0), tl.program_id(1)
    order = table + i_order * ROW_LENGTH
    num_rows = tl.load(order + NUM_ROWS)
    first = scores + scores_begin(order, first_selection + i_selection, num_selections, num_rows)
    second = work + scores_begin(order, i_selection, tl.num_programs(0), num_rows)
    size = size.to(tl.int64)
    keys, places, more_places = second + size, second + 2 * size, second + 3 * size

    unsorted = first
    for i_score in range(2):
        sorted_places = _sort(unsorted, keys, places, more_places, num_rows, TILE)
        for start in range(0, num_rows, TILE):
            o_sorted = start + tl.arange(0, TILE)
            m_sorted = o_sorted < num_rows
            b_place = tl.load(sorted_places + o_sorted, mask=m_sorted, other=0)
            b_rank = num_rows - 1 - o_sorted
            b_sum = (tl.load(first + b_place, mask=m_sorted, other=0) + b_rank).to(tl.float32)
            b_bits = b_sum.to(tl.int32, bitcast=True)
            b_sum = tl.where(raw != 0, b_bits, selection_keys(b_sum, order, b_place, num_rows))
            tl.store(first + b_place, tl.where(i_score == 0, b_rank, b_sum), mask=m_sorted)
        tl.debug_barrier()
        unsorted = second


@triton.jit
def _sort(keys, more_keys, places, more_places, num_rows, TILE: tl.constexpr):
    """Stable sort: row indices in descending order of score. Returns `places` or `more_places`, which holds them.

    `keys` holds raw scores at first and is undefined afterwards. Each pass sorts by one digit of four bits, the lowest
    first. Four digits suffice, since scores are truncated to bf16 as in the reference. Digits that all keys share are
    skipped: scores of one kind often share their upper digits.
    """
    for start in range(0, num_rows, TILE):
        o_row = start + tl.arange(0, TILE)
        m_row = o_row < num_rows
        # A computed NaN is still NaN after truncation, since the highest bit of its fraction is set.
        b_bits = tl.load(keys + o_row, mask=m_row, other=0) & -0x10000
        b_key = descending(b_bits.to(tl.float32, bitcast=True)) >> 16
        tl.store(keys + o_row, b_key + 0x8000, mask=m_row)
        tl.store(places + o_row, o_row, mask=m_row)
    tl.debug_barrier()
    o_digit = tl.arange(0, 16)
    num_padding = (TILE - num_rows % TILE) % TILE
    for shift in range(0, 16, 4):
        b_count = tl.where(o_digit == 15, -num_padding, 0)
        for start in range(0, num_rows, TILE):
            o_row = start + tl.arange(0, TILE)
            b_key = tl.load(keys + o_row, mask=o_row < num_rows, other=0xFFFF)
            b_count += tl.histogram((b_key >> shift) & 15, 16)
        if tl.max(b_count, axis=0) < num_rows:
            b_next = tl.cumsum(b_count, axis=0) - b_count
            for start in range(0, num_rows, TILE):
                o_row = start + tl.arange(0, TILE)
                m_row = o_row < num_rows
                # Padding has the last digit and comes last, so it takes the rank of no row.
                b_key = tl.load(keys + o_row, mask=m_row, other=0xFFFF)
                b_place = tl.load(places + o_row, mask=m_row, other=0)
                b_digit = (b_key >> shift) & 15
                o_to = tl.gather(b_next, b_digit, axis=0) + _ranks_in_tile(b_digit)
                tl.store(more_keys + o_to, b_key, mask=m_row)
                tl.store(more_places + o_to, b_place, mask=m_row)
                b_next += tl.histogram(b_digit, 16)
            tl.debug_barrier()
            keys, more_keys = more_keys, keys
            places, more_places = more_places, places
    return places


@triton.jit
def _ranks_in_tile(b_digit):
    """For each digit, how many equal digits come before it. Four 16-bit counters are packed into one number."""
    b_rank = tl.zeros_like(b_digit)
    b_shift = 16 * (b_digit & 3).to(tl.int64)
    for i_part in range(4):
        m_part = (b_digit >> 2) == i_part
        b_one = tl.where(m_part, tl.full(b_digit.shape, 1, tl.int64) << b_shift, 0)
        b_counts = tl.cumsum(b_one, axis=0) - b_one
        b_rank += tl.where(m_part, (b_counts >> b_shift) & 0xFFFF, 0).to(tl.int32)
    return b_rank
