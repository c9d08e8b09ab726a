"""Kernels that select the kept positions and move the kept rows.

Prefixes of names in all kernels: `i_` program index, `o_` offsets, `m_` mask, `b_` loaded values.
"""

import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import (
    AFTER_ALL,
    DESTINATION,
    NUM_DESTINATION,
    NUM_KEEP,
    NUM_ROWS,
    PROTECTED,
    ROW_LENGTH,
    SOURCE,
    Batch,
    head_base,
    row_offsets,
    scores_begin,
)

TILES = (1024, 4096)
"""Scores that a program of `_select_kernel` reads at once: the first number for requests that fit, else the last."""
MOVE_ROWS = 64
MOVE_SPLIT = 32


def tile_of(longest: int) -> int:
    """The tile size for orders of which the longest has `longest` rows."""
    return TILES[0 if longest <= TILES[0] else -1]


def select_positions(batch: Batch, scores: torch.Tensor) -> None:
    """Replaces each selection's keys by the positions of its `num_keep` lowest keys, ascending.

    Args:
        batch: The orders.
        scores: `[num_selections * num_rows]` int32, `batch.selection_keys`: by order, then by layer and head, then by
            row. Afterwards the first `num_keep` elements of each selection are positions.
    """
    grid = (len(batch.rows), batch.cache.num_selections)
    tile = tile_of(batch.longest)
    _select_kernel[grid](batch.table, scores, TILE=tile, num_warps=8 if tile == TILES[-1] else 4)


def move_rows(batch: Batch, kept: torch.Tensor) -> None:
    """Moves kept rows into the destination blocks and zeroes the slots after them.

    Args:
        batch: The orders.
        kept: The positions from `select_positions`.
    """
    cache = batch.cache
    _move_kernel[(len(batch.rows), cache.num_selections, MOVE_SPLIT)](
        cache.pointers, cache.heads[0], batch.table, kept, *cache.strides, cache.block_size,
        CONTENT=cache.content, CONTENT_PADDED=triton.next_power_of_2(cache.content), ROWS=MOVE_ROWS, SPLIT=MOVE_SPLIT,
    )  # fmt: skip


@triton.jit
def _select_kernel(
    table,  # [num_orders * ROW_LENGTH + num_blocks] int32
    scores,  # [num_selections * num_tokens] int32; the kept positions replace the scores
    TILE: tl.constexpr,
):
    i_order, i_selection = tl.program_id(0), tl.program_id(1)
    order = table + i_order * ROW_LENGTH
    num_rows, num_keep = tl.load(order + NUM_ROWS), tl.load(order + NUM_KEEP)
    row = scores + scores_begin(order, i_selection, tl.num_programs(1), num_rows)

    # Bisection for the num_keep-th smallest key: the highest value with fewer than num_keep keys below it. The keys
    # stay in the L1 and L2 caches. (Radix selection with a histogram for each byte would need fewer passes, but norms
    # share their upper bytes, and atomics on one bin are serialized.) Protected rows are always kept, so the search
    # covers only the others; in 64 bits, since the difference of two int32 keys may exceed 32 bits.
    lowest, highest = tl.full([], AFTER_ALL, tl.int64), tl.full([], PROTECTED, tl.int64)
    for start in range(0, num_rows, TILE):
        o_token = start + tl.arange(0, TILE)
        b_key = tl.load(row + o_token, mask=o_token < num_rows, other=PROTECTED)
        m_free = b_key != PROTECTED
        lowest = tl.minimum(lowest, tl.min(tl.where(m_free, b_key, AFTER_ALL), axis=0).to(tl.int64))
        highest = tl.maximum(highest, tl.max(b_key, axis=0).to(tl.int64))
    while lowest < highest:
        middle = highest - (highest - lowest) // 2  # above lowest, so the interval shrinks
        num_below = 0
        for start in range(0, num_rows, TILE):
            o_token = start + tl.arange(0, TILE)
            b_key = tl.load(row + o_token, mask=o_token < num_rows, other=AFTER_ALL)
            num_below += tl.sum((b_key < middle.to(tl.int32)).to(tl.int32), axis=0)
        if num_below < num_keep:
            lowest = middle
        else:
            highest = middle - 1
    threshold = lowest.to(tl.int32)
    num_below = 0
    for start in range(0, num_rows, TILE):
        o_token = start + tl.arange(0, TILE)
        b_key = tl.load(row + o_token, mask=o_token < num_rows, other=AFTER_ALL)
        num_below += tl.sum((b_key < threshold).to(tl.int32), axis=0)
    remaining = num_keep - num_below
    # `remaining` of the keys equal to the threshold are kept: those with the lowest positions.

    num_taken = 0
    num_equal = 0
    for start in range(0, num_rows, TILE):
        o_token = start + tl.arange(0, TILE)
        m_token = o_token < num_rows
        b_key = tl.load(row + o_token, mask=m_token, other=AFTER_ALL)
        b_equal = ((b_key == threshold) & m_token).to(tl.int32)
        b_rank = num_equal + tl.cumsum(b_equal, axis=0)
        b_take = (((b_key < threshold) & m_token) | ((b_equal == 1) & (b_rank <= remaining))).to(tl.int32)
        o_kept = num_taken + tl.cumsum(b_take, axis=0) - 1
        # Writing never overtakes reading: after n keys are read, at most n positions have been written.
        tl.debug_barrier()
        tl.store(row + o_kept, o_token, mask=b_take == 1)
        num_taken += tl.sum(b_take, axis=0)
        num_equal += tl.sum(b_equal, axis=0)


@triton.jit
def _move_kernel(
    pointers,  # [num_selections] int64
    like,  # a tensor of the cache's type
    table,  # [num_orders * ROW_LENGTH + num_blocks] int32
    kept,  # [num_selections * num_tokens] int32
    stride_block,
    stride_slot,
    block_size,
    CONTENT: tl.constexpr,
    CONTENT_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    i_order, i_selection, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    order = table + i_order * ROW_LENGTH
    num_rows, num_keep = tl.load(order + NUM_ROWS), tl.load(order + NUM_KEEP)
    source, destination = table + tl.load(order + SOURCE), table + tl.load(order + DESTINATION)
    num_slots = tl.load(order + NUM_DESTINATION) * block_size
    row = kept + scores_begin(order, i_selection, tl.num_programs(1), num_rows)
    base = head_base(pointers, like, i_selection)
    o_content = tl.arange(0, CONTENT_PADDED)
    m_content = (o_content < CONTENT)[None, :]

    # In place, a row to be moved may be in the slot of a row to be written. The destination blocks are then the first
    # source blocks, and kept positions ascend, so slot j gets a row from slot j or later: it is safe if one program
    # moves the tiles in order, and reads each before writing it. In fresh blocks, tiles are independent.
    in_place = tl.load(source) == tl.load(destination)
    step = tl.where(in_place, 1, SPLIT)
    first = tl.where(in_place & (i_split > 0), num_slots, i_split * ROWS)
    for start in range(first, num_slots, step * ROWS):
        o_slot = start + tl.arange(0, ROWS)
        m_kept = o_slot < num_keep
        b_position = tl.load(row + o_slot, mask=m_kept, other=0)
        o_from = row_offsets(source, b_position, m_kept, stride_block, stride_slot, block_size)
        b_row = tl.load(base + o_from[:, None] + o_content[None, :], mask=m_kept[:, None] & m_content, other=0)

        m_slot = o_slot < num_slots
        o_to = row_offsets(destination, o_slot, m_slot, stride_block, stride_slot, block_size)
        tl.debug_barrier()
        tl.store(base + o_to[:, None] + o_content[None, :], b_row, mask=m_slot[:, None] & m_content)
