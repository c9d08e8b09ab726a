"""Kernels that score, select and move, and the table of orders that all three read.

`triton_compactor` launches them. Names: `i_` program index, `o_` offsets, `m_` mask, `b_` loaded values.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.group_cache import GroupCache
from vllm_l2kv.messages.orders import CompactionOrder

SCORE_ROWS = 32
SELECT_TILES = (1024, 4096)
"""Scores that a program of `_select_kernel` reads at once: the first for requests that fit it, else the last."""
MOVE_ROWS = 64
MOVE_SPLIT = 32


class OrderRow(NamedTuple):
    """One order as the kernels read it: a row of the table, each number in the column of its name below.

    Attributes:
        num_rows: As that of `CompactionOrder`.
        num_keep: As that of `CompactionOrder`.
        protect_first: As that of `CompressionParams`.
        protect_last: As that of `CompressionParams`.
        source: Where the ids of the source blocks begin in the table.
        destination: Where those of the destination blocks begin, right after the source blocks.
        num_destination: Destination blocks.
        first_score: Rows of the orders before, whose scores come first.
    """

    num_rows: int
    num_keep: int
    protect_first: int
    protect_last: int
    source: int
    destination: int
    num_destination: int
    first_score: int


def _column(name: str) -> tl.constexpr:
    return tl.constexpr(OrderRow._fields.index(name))


ROW_LENGTH = tl.constexpr(len(OrderRow._fields))
NUM_ROWS = _column("num_rows")
NUM_KEEP = _column("num_keep")
PROTECT_FIRST = _column("protect_first")
PROTECT_LAST = _column("protect_last")
SOURCE = _column("source")
DESTINATION = _column("destination")
NUM_DESTINATION = _column("num_destination")
FIRST_SCORE = _column("first_score")


def order_table(
    orders: Sequence[CompactionOrder], group_id: int, device: torch.device
) -> tuple[list[OrderRow], torch.Tensor]:
    """Everything the kernels must know of the orders, in one transfer that the host does not wait for.

    Args:
        orders: Of one launch.
        group_id: The KV-cache group whose blocks are meant.
        device: Of the kernels.

    Returns:
        The orders' rows, and the table: `[num_orders * len(OrderRow) + num_blocks]` int32, the rows, then all block
        ids.
    """
    rows: list[OrderRow] = []
    blocks: list[tuple[int, ...]] = []
    next_block = len(orders) * len(OrderRow._fields)
    first_score = 0
    for order in orders:
        move = order.move_of(group_id)
        row = OrderRow(
            num_rows=order.num_rows,
            num_keep=order.num_keep,
            protect_first=order.params.protect_first,
            protect_last=order.params.protect_last,
            source=next_block,
            destination=next_block + len(move.source),
            num_destination=len(move.destination),
            first_score=first_score,
        )
        rows.append(row)
        blocks += [move.source, move.destination]
        next_block = row.destination + row.num_destination
        first_score += order.num_rows
    table = torch.from_numpy(np.fromiter(chain(*rows, *blocks), dtype=np.int32, count=next_block))
    return rows, table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def score_norms(cache: GroupCache, table: torch.Tensor, scores: torch.Tensor, num_orders: int, longest: int) -> None:
    """Norms of each request's keys as integers that sort alike, lower for what is kept sooner; 0 if protected.

    Args:
        cache: The group's caches.
        table: Of `order_table`.
        scores: `[num_selections * num_tokens]` int32, written: orders, then their layers and heads, then their tokens.
        num_orders: Orders in the table.
        longest: Rows of the longest of them.
    """
    layer = cache.layers[0]
    num_kv_heads, block_size = layer.shape[1:3]
    _score_kernel[(triton.cdiv(longest, SCORE_ROWS), cache.num_rows_per_token, num_orders)](
        cache.pointers, layer.view(cache.key_dtype), table, scores, *layer.stride()[:3], num_kv_heads, block_size,
        HEAD_SIZE=cache.head_size, HEAD_PADDED=triton.next_power_of_2(cache.head_size), ROWS=SCORE_ROWS,
    )  # fmt: skip


def select_positions(
    cache: GroupCache, table: torch.Tensor, scores: torch.Tensor, num_orders: int, longest: int
) -> None:
    """The positions of each selection's lowest scores, ascending, in the place of the scores.

    Args:
        cache: As of `score_norms`.
        table: As of `score_norms`.
        scores: As of `score_norms`; the first `num_keep` of each selection are positions afterwards.
        num_orders: As of `score_norms`.
        longest: As of `score_norms`.
    """
    tile = SELECT_TILES[0 if longest <= SELECT_TILES[0] else -1]
    _select_kernel[(num_orders, cache.num_rows_per_token)](table, scores, TILE=tile)


def move_rows(cache: GroupCache, table: torch.Tensor, kept: torch.Tensor, num_orders: int) -> None:
    """Kept rows into the destination blocks; the slots after them are zeroed.

    Args:
        cache: As of `score_norms`.
        table: As of `score_norms`.
        kept: The positions of `select_positions`.
        num_orders: As of `score_norms`.
    """
    layer = cache.layers[0]
    num_kv_heads, block_size, content = layer.shape[1:]
    _move_kernel[(num_orders, cache.num_rows_per_token, MOVE_SPLIT)](
        cache.pointers, layer, table, kept, *layer.stride()[:3], num_kv_heads, block_size,
        CONTENT=content, CONTENT_PADDED=triton.next_power_of_2(content), ROWS=MOVE_ROWS, SPLIT=MOVE_SPLIT,
    )  # fmt: skip


@triton.jit
def _row_base(pointers, like, i_layer):
    """Address of a layer's cache, as a pointer of the cache's element type."""
    # Rows are whole vectors apart from an aligned address; without the hint every element is loaded alone.
    return tl.multiple_of(tl.load(pointers + i_layer).to(like.dtype), 16)


@triton.jit
def _score_kernel(
    pointers,  # [num_layers] int64
    like,  # a tensor of the keys' type
    table,  # [num_orders * ROW_LENGTH + num_blocks] int32
    scores,  # [num_selections * num_tokens] int32
    stride_block,
    stride_head,
    stride_slot,
    num_kv_heads,
    block_size,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_tile, i_selection, i_order = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_layer, i_head = i_selection // num_kv_heads, i_selection % num_kv_heads
    order = table + i_order * ROW_LENGTH
    num_rows = tl.load(order + NUM_ROWS)
    if i_tile * ROWS >= num_rows:
        return
    protect_first, protect_last = tl.load(order + PROTECT_FIRST), tl.load(order + PROTECT_LAST)
    source = table + tl.load(order + SOURCE)
    first_score = tl.load(order + FIRST_SCORE).to(tl.int64)

    o_token = i_tile * ROWS + tl.arange(0, ROWS)
    m_token = o_token < num_rows
    b_block = tl.load(source + o_token // block_size, mask=m_token, other=0).to(tl.int64)
    o_row = b_block * stride_block + i_head * stride_head + (o_token % block_size).to(tl.int64) * stride_slot
    o_dim = tl.arange(0, HEAD_PADDED)
    mask = m_token[:, None] & (o_dim < HEAD_SIZE)[None, :]
    base = _row_base(pointers, like, i_layer)
    b_key = tl.load(base + o_row[:, None] + o_dim[None, :], mask=mask).to(tl.float32)
    b_key = tl.where(mask, b_key, 0.0)
    b_norm = tl.sqrt_rn(tl.sum(b_key * b_key, axis=1))

    # A scale common to a layer's keys (fp8) leaves their order alone, so it is not read.
    # Norms are not negative, so their bits sort as they do. 0 is kept for protected tokens; a NaN sorts last.
    b_bits = tl.minimum(b_norm.to(tl.int32, bitcast=True), 0x7FFFFFFE) + 1
    m_protected = (o_token < protect_first) | (o_token >= num_rows - protect_last)
    o_score = (first_score * tl.num_programs(1)) + i_selection.to(tl.int64) * num_rows + o_token
    tl.store(scores + o_score, tl.where(m_protected, 0, b_bits), mask=m_token)


@triton.jit
def _select_kernel(
    table,  # [num_orders * ROW_LENGTH + num_blocks] int32
    scores,  # [num_selections * num_tokens] int32; the kept positions replace the scores
    TILE: tl.constexpr,
):
    i_order, i_selection = tl.program_id(0), tl.program_id(1)
    order = table + i_order * ROW_LENGTH
    num_rows, num_keep = tl.load(order + NUM_ROWS), tl.load(order + NUM_KEEP)
    first_score = tl.load(order + FIRST_SCORE).to(tl.int64)
    row = scores + first_score * tl.num_programs(1) + i_selection.to(tl.int64) * num_rows

    # Bisection for the num_keep-th smallest score: the highest value with fewer than num_keep scores below it. The row
    # stays in the caches near the program. (A histogram a byte would need fewer passes, but norms share their upper
    # bytes, and atomics on one bin wait for each other.)
    lowest, highest = 0x7FFFFFFF, 0
    for start in range(0, num_rows, TILE):
        o_token = start + tl.arange(0, TILE)
        m_token = o_token < num_rows
        lowest = tl.minimum(lowest, tl.min(tl.load(row + o_token, mask=m_token, other=0x7FFFFFFF), axis=0))
        highest = tl.maximum(highest, tl.max(tl.load(row + o_token, mask=m_token, other=0), axis=0))
    while lowest < highest:
        middle = highest - (highest - lowest) // 2  # above lowest, so the interval shrinks
        num_below = 0
        for start in range(0, num_rows, TILE):
            o_token = start + tl.arange(0, TILE)
            b_score = tl.load(row + o_token, mask=o_token < num_rows, other=0x7FFFFFFF)
            num_below += tl.sum((b_score < middle).to(tl.int32), axis=0)
        if num_below < num_keep:
            lowest = middle
        else:
            highest = middle - 1
    threshold = lowest
    num_below = 0
    for start in range(0, num_rows, TILE):
        o_token = start + tl.arange(0, TILE)
        b_score = tl.load(row + o_token, mask=o_token < num_rows, other=0x7FFFFFFF)
        num_below += tl.sum((b_score < threshold).to(tl.int32), axis=0)
    remaining = num_keep - num_below
    # `remaining` of the scores equal to the threshold are kept: those of the lowest positions.

    num_taken = 0
    num_equal = 0
    for start in range(0, num_rows, TILE):
        o_token = start + tl.arange(0, TILE)
        m_token = o_token < num_rows
        b_score = tl.load(row + o_token, mask=m_token, other=0x7FFFFFFF)
        b_equal = ((b_score == threshold) & m_token).to(tl.int32)
        b_rank = num_equal + tl.cumsum(b_equal, axis=0)
        b_take = (((b_score < threshold) & m_token) | ((b_equal == 1) & (b_rank <= remaining))).to(tl.int32)
        o_kept = num_taken + tl.cumsum(b_take, axis=0) - 1
        # Kept positions never overtake the tiles that are read: a row of n scores ends as num_keep <= n positions.
        tl.debug_barrier()
        tl.store(row + o_kept, o_token, mask=b_take == 1)
        num_taken += tl.sum(b_take, axis=0)
        num_equal += tl.sum(b_equal, axis=0)


@triton.jit
def _move_kernel(
    pointers,  # [num_layers] int64
    like,  # a tensor of the cache's type
    table,  # [num_orders * ROW_LENGTH + num_blocks] int32
    kept,  # [num_selections * num_tokens] int32
    stride_block,
    stride_head,
    stride_slot,
    num_kv_heads,
    block_size,
    CONTENT: tl.constexpr,
    CONTENT_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    i_order, i_selection, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_layer, i_head = i_selection // num_kv_heads, i_selection % num_kv_heads
    order = table + i_order * ROW_LENGTH
    num_rows, num_keep = tl.load(order + NUM_ROWS), tl.load(order + NUM_KEEP)
    source, destination = table + tl.load(order + SOURCE), table + tl.load(order + DESTINATION)
    num_slots = tl.load(order + NUM_DESTINATION) * block_size
    first_score = tl.load(order + FIRST_SCORE).to(tl.int64)
    row = kept + first_score * tl.num_programs(1) + i_selection.to(tl.int64) * num_rows
    base = _row_base(pointers, like, i_layer) + i_head * stride_head
    o_content = tl.arange(0, CONTENT_PADDED)
    m_content = (o_content < CONTENT)[None, :]

    # In place a row may lie where another is about to be written. Destination blocks are the first source blocks then,
    # and kept positions ascend, so slot j takes a row from slot j or later: one program, in order, reads a tile before
    # it writes it. Into fresh blocks the tiles are independent.
    in_place = tl.load(source) == tl.load(destination)
    step = tl.where(in_place, 1, SPLIT)
    first = tl.where(in_place & (i_split > 0), num_slots, i_split * ROWS)
    for start in range(first, num_slots, step * ROWS):
        o_slot = start + tl.arange(0, ROWS)
        m_kept = o_slot < num_keep
        b_position = tl.load(row + o_slot, mask=m_kept, other=0)
        b_block = tl.load(source + b_position // block_size, mask=m_kept, other=0).to(tl.int64)
        o_from = b_block * stride_block + (b_position % block_size).to(tl.int64) * stride_slot
        b_row = tl.load(base + o_from[:, None] + o_content[None, :], mask=m_kept[:, None] & m_content, other=0)

        m_slot = o_slot < num_slots
        b_block = tl.load(destination + o_slot // block_size, mask=m_slot, other=0).to(tl.int64)
        o_to = b_block * stride_block + (o_slot % block_size).to(tl.int64) * stride_slot
        tl.debug_barrier()
        tl.store(base + o_to[:, None] + o_content[None, :], b_row, mask=m_slot[:, None] & m_content)
