"""The orders of one kernel launch as a table on the device, and functions that kernels use to read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.group_cache import GroupCache
from vllm_l2kv.messages.orders import CompactionOrder


class OrderRow(NamedTuple):
    """One order as a row of the table; the constants below number its columns.

    Attributes:
        num_rows: See `CompactionOrder`.
        num_keep: See `CompactionOrder`.
        protect_first: See `CompressionParams`.
        protect_last: See `CompressionParams`.
        source: Index in the table of the first source block's id.
        destination: Index in the table of the first destination block's id, right after the source blocks.
        num_destination: Number of destination blocks.
        first_score: Rows of all earlier orders, whose scores come first.
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


@dataclass(frozen=True)
class Batch:
    """The orders of one launch. A *selection* is one layer and head of an order.

    Attributes:
        cache: The caches of the KV-cache group.
        rows: One row for each order.
        table: `[num_orders * len(OrderRow) + num_blocks]` int32 on the device: the rows, then all block ids.
    """

    cache: GroupCache
    rows: Sequence[OrderRow]
    table: torch.Tensor

    @classmethod
    def of(cls, cache: GroupCache, orders: Sequence[CompactionOrder], group_id: int) -> "Batch":
        """Copies the orders to the device in one asynchronous transfer.

        Args:
            cache: See the attribute.
            orders: The orders of one launch.
            group_id: Id of the KV-cache group whose moves are used.
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
        device = cache.pointers.device
        return cls(cache, rows, table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table)

    @property
    def longest(self) -> int:
        """Rows of the longest order."""
        return max(row.num_rows for row in self.rows)

    @property
    def num_rows(self) -> int:
        """Rows of all orders together."""
        return self.rows[-1].first_score + self.rows[-1].num_rows


@triton.jit
def head_base(pointers, like, i_selection):
    """Address of a head's cache, as a pointer of the type of `like`."""
    # Rows are aligned to 16 bytes; without this hint, elements would be loaded one by one.
    return tl.multiple_of(tl.load(pointers + i_selection).to(like.dtype), 16)


@triton.jit
def row_offsets(blocks, o_row, m_row, stride_block, stride_slot, block_size):
    """Offsets of rows from the base of their head: `[num_rows]` int64."""
    b_block = tl.load(blocks + o_row // block_size, mask=m_row, other=0).to(tl.int64)
    return b_block * stride_block + (o_row % block_size).to(tl.int64) * stride_slot


@triton.jit
def row_pointers(
    pointers, like, order, table, i_selection, o_row, m_row, stride_block, stride_slot, block_size
):  # fmt: skip
    """Addresses of the rows of one selection: `[num_rows]` pointers of the type of `like`."""
    source = table + tl.load(order + SOURCE)
    base = head_base(pointers, like, i_selection)
    return base + row_offsets(source, o_row, m_row, stride_block, stride_slot, block_size)


@triton.jit
def scores_begin(order, i_selection, num_selections, num_rows):
    """Index of the first score of a selection, in the order of `scores.Scored.write`; int64."""
    return tl.load(order + FIRST_SCORE).to(tl.int64) * num_selections + i_selection.to(tl.int64) * num_rows


@triton.jit
def load_elements(rows, m_row, o_element, m_element):
    """Elements of rows in fp32, zeros where masked: `[num_rows, num_elements]`."""
    mask = m_row[:, None] & m_element[None, :]
    # Not `other=0.0`: masked elements would be undefined, since some types cannot represent that constant.
    return tl.where(mask, tl.load(rows[:, None] + o_element[None, :], mask=mask).to(tl.float32), 0.0)


@triton.jit
def load_part(rows, m_row, BEGIN: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """`SIZE` elements of rows, then zeros: `[num_rows, PADDED]` fp32."""
    o_element = tl.arange(0, PADDED)
    return load_elements(rows, m_row, BEGIN + o_element, o_element < SIZE)


@triton.jit
def descending(score):
    """fp32 scores as int32 in descending order; NaN counts as the lowest score, infinity as the largest number."""
    # The same order as in `kernels.reference.ranked`. Both zeros are equal.
    score = tl.where(score == score, score, float("-inf"))
    score = tl.minimum(score, 3.4028234663852886e38)
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    return -tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


PROTECTED = tl.constexpr(-(2**31))
AFTER_ALL = tl.constexpr(2**31 - 1)


@triton.jit
def selection_keys(score, order, o_row, num_rows):
    """fp32 scores as the int32 keys of `select_positions`: lower is kept sooner; protected rows have the lowest."""
    m_protected = o_row < tl.load(order + PROTECT_FIRST)
    m_protected |= o_row >= num_rows - tl.load(order + PROTECT_LAST)
    return tl.where(m_protected, PROTECTED, descending(score))


@triton.jit
def key_norms(rows, m_row, KEY: tl.constexpr, KEY_PADDED: tl.constexpr):
    """L2 norms of keys: `[num_rows]` fp32."""
    b_key = load_part(rows, m_row, 0, KEY, KEY_PADDED)
    return tl.sqrt_rn(tl.sum(b_key * b_key, axis=1))


@triton.jit
def value_norms(rows, m_row, KEY: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr):
    """L2 norms of values: `[num_rows]` fp32."""
    b_value = load_part(rows, m_row, KEY, VALUE, VALUE_PADDED)
    return tl.sqrt_rn(tl.sum(b_value * b_value, axis=1))
