"""Page tables for decode attention in which every (request, KV head) is a sequence with pages of one head.

The two classes of heads have blocks in two KV-cache groups, which share one pool. Divided into pages of one head, all
blocks look alike. So one call of a paged attention kernel serves both classes, with a table and a length per sequence.

    page id = block * pages between blocks + page of the head in block 0 + page in the block

A layer's sequences are those of its full heads, then those of its compressed heads; for each head, the requests of the
batch. So layers with the same number of full heads have the same lengths in the same order. Knows nothing of vLLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

TILE = 512
"""Pages per tile of a program."""
PROGRAMS = 512
"""Fewest programs of a launch, if its requests are long."""
MOST_SPLITS = 16


class Blocks(NamedTuple):
    """Layout of one class's blocks in the pool.

    Attributes:
        apart: Pages from one block to the next.
        of_head: Pages of one head in a block.
    """

    apart: int
    of_head: int


class Held(NamedTuple):
    """Blocks and rows of one class that the requests of a batch hold.

    Attributes:
        blocks: `[num_requests, max_num_blocks]` int32, block tables.
        lengths: `[num_requests]` int32, numbers of rows, including those that this step writes.
        slots: `[num_requests]` int64, slots of the rows that this step writes; -1 for padding requests.
    """

    blocks: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor


class Sequences(NamedTuple):
    """The sequences of a call by head: rewritten for each layer, always at the same addresses.

    Attributes:
        pages: `[num_sequences, max_num_pages]` int32, page ids.
        lengths: `[num_sequences]` int32, numbers of rows.
        starts: `[num_sequences + 1]` int32, index of each sequence's query in `[num_requests * num_kv_heads]`; not
            ascending. The last element is undefined.
    """

    pages: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(cls, num_sequences: int, max_num_pages: int, device: torch.device) -> "Sequences":
        """Allocates tensors for `num_sequences` sequences."""
        sizes = (num_sequences, max_num_pages), (num_sequences,), (num_sequences + 1,)
        return cls(*(torch.zeros(size, dtype=torch.int32, device=device) for size in sizes))

    def first(self, num_sequences: int) -> "Sequences":
        """Views of the first `num_sequences` sequences, at the same addresses."""
        return Sequences(self.pages[:num_sequences], self.lengths[:num_sequences], self.starts[: num_sequences + 1])


@dataclass(frozen=True)
class HeadPages:
    """One layer's heads as pages.

    Attributes:
        pool: `[num_pages, page_size, 1, content]`, the whole pool; a row holds the key, then the value.
        places: `[num_kv_heads, 2]` int32, in the order of sequences: index of the head, and its first page in block 0.
        num_full: Number of full heads, which come first.
        full: Layout of the full heads' blocks.
        compressed: Layout of the compressed heads' blocks.
    """

    pool: torch.Tensor
    places: torch.Tensor
    num_full: int
    full: Blocks
    compressed: Blocks

    @classmethod
    def of(
        cls,
        full: torch.Tensor,
        compressed: torch.Tensor,
        full_heads: Sequence[int],
        compressed_heads: Sequence[int],
    ) -> "HeadPages | None":
        """The pages of a layer's two caches.

        Args:
            full: Cache of the full heads, `[num_blocks, num_heads, block_size, content]`.
            compressed: Cache of the compressed heads, in the same form; the block size may differ.
            full_heads: Indices of the full heads in the layer.
            compressed_heads: Indices of the compressed heads in the layer.

        Returns:
            `None` if the caches are not in one memory, blocks do not begin at whole pages, or int32 cannot count the
            pages.
        """
        page_size, content = min(full.shape[2], compressed.shape[2]), full.shape[3]
        size = page_size * content
        places, blocks = [], []
        for cache, heads in ((full, full_heads), (compressed, compressed_heads)):
            block_size = cache.shape[2]
            # With a single head, its stride is arbitrary.
            of_head, *of_rows = cache.stride()[1:]
            is_rows = of_rows == [content, 1] and (cache.shape[1] == 1 or of_head == block_size * content)
            if not is_rows or block_size % page_size or cache.stride(0) % size or cache.storage_offset() % size:
                return None
            blocks.append(Blocks(cache.stride(0) // size, block_size // page_size))
            first = cache.storage_offset() // size
            places += [(head, first + i * blocks[-1].of_head) for i, head in enumerate(heads)]
        num_pages = full.untyped_storage().nbytes() // full.itemsize // size
        if full.untyped_storage().data_ptr() != compressed.untyped_storage().data_ptr() or num_pages >= 2**31:
            return None
        pool = torch.as_strided(full, (num_pages, page_size, 1, content), (size, content, size, 1), 0)
        return cls(pool, torch.tensor(places, dtype=torch.int32, device=full.device), len(full_heads), *blocks)

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.pool.shape[1]

    def write(
        self,
        out: Sequences,
        keys: torch.Tensor,
        values: torch.Tensor,
        full: Held,
        compressed: Held,
        key_scale: torch.Tensor,
        value_scale: torch.Tensor,
    ) -> None:
        """Writes each request's new row to the caches, and the layer's sequences to `out`, in one launch.

        Args:
            out: Sequences to write, one for each request and head.
            keys: `[num_requests, num_kv_heads, head_size]`, rows contiguous.
            values: Same shape.
            full: Blocks and rows of the full heads.
            compressed: Blocks and rows of the compressed heads.
            key_scale: `[1]` fp32, by which keys are divided for an fp8 cache; unused for others.
            value_scale: `[1]` fp32, the same for values.
        """
        num_requests, head_size = full.lengths.shape[0], keys.shape[2]
        num_heads = self.places.shape[0]
        num_splits = min(max(PROGRAMS // (num_requests * num_heads), 1), MOST_SPLITS)
        is_quantized = self.pool.itemsize == 1
        pool = self.pool.view(torch.float8_e4m3fn) if is_quantized else self.pool
        _write_kernel[(num_requests, num_heads, num_splits)](
            pool, self.places, self.num_full,
            full.blocks, full.blocks.stride(0), full.lengths, full.slots, *self.full,
            compressed.blocks, compressed.blocks.stride(0), compressed.lengths, compressed.slots, *self.compressed,
            keys, keys.stride(0), keys.stride(1), values, values.stride(0), values.stride(1), key_scale, value_scale,
            out.pages, out.pages.stride(0), out.lengths, out.starts,
            PAGE=self.page_size, KEY=head_size, VALUE=values.shape[2],
            KEY_PADDED=triton.next_power_of_2(head_size), VALUE_PADDED=triton.next_power_of_2(values.shape[2]),
            IS_QUANTIZED=is_quantized, TILE=TILE, SPLIT=num_splits,
        )  # fmt: skip


@triton.jit
def _scaled(elements, scale, IS_QUANTIZED: tl.constexpr):
    """Elements divided by the scale of a quantized cache, before they are rounded to its type."""
    if IS_QUANTIZED:
        elements = tl.div_rn(elements.to(tl.float32), tl.load(scale))
    return elements


@triton.jit(do_not_specialize=["num_full", "full_apart", "full_of_head", "compressed_apart", "compressed_of_head"])
def _write_kernel(
    pool,  # [num_pages, PAGE, KEY + VALUE]
    places,  # [num_heads, 2] int32
    num_full,
    full_blocks,  # [num_requests, _] int32
    full_blocks_stride,
    full_lengths,  # [num_requests] int32
    full_slots,  # [num_requests] int64
    full_apart,
    full_of_head,
    compressed_blocks,  # these five as for the full heads
    compressed_blocks_stride,
    compressed_lengths,
    compressed_slots,
    compressed_apart,
    compressed_of_head,
    keys,  # [num_requests, num_heads, KEY]
    keys_stride_request,
    keys_stride_head,
    values,  # [num_requests, num_heads, VALUE]
    values_stride_request,
    values_stride_head,
    key_scale,  # [1] fp32
    value_scale,  # [1] fp32
    pages,  # [num_sequences, _] int32
    pages_stride,
    lengths,  # [num_sequences] int32
    starts,  # [num_sequences] int32
    PAGE: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    i_request, i_place, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_requests, num_heads = tl.num_programs(0), tl.num_programs(1)
    head = tl.load(places + 2 * i_place)
    first = tl.load(places + 2 * i_place + 1)
    if i_place < num_full:
        blocks = full_blocks + i_request.to(tl.int64) * full_blocks_stride
        length = tl.load(full_lengths + i_request)
        slot = tl.load(full_slots + i_request)
        apart, of_head = full_apart, full_of_head
    else:
        blocks = compressed_blocks + i_request.to(tl.int64) * compressed_blocks_stride
        length = tl.load(compressed_lengths + i_request)
        slot = tl.load(compressed_slots + i_request)
        apart, of_head = compressed_apart, compressed_of_head

    sequence = i_place * num_requests + i_request
    num_pages = (length + PAGE - 1) // PAGE
    row = pages + sequence.to(tl.int64) * pages_stride
    for start in range(i_split * TILE, num_pages, SPLIT * TILE):
        o_page = start + tl.arange(0, TILE)
        m_page = o_page < num_pages
        b_block = tl.load(blocks + o_page // of_head, mask=m_page, other=0)
        tl.store(row + o_page, b_block * apart + first + o_page % of_head, mask=m_page)
    if i_split > 0:
        return
    tl.store(lengths + sequence, length)
    tl.store(starts + sequence, i_request * num_heads + head)

    # A head's rows in a block are consecutive, over all of the head's pages.
    block_size = of_head * PAGE
    page = (slot // block_size) * apart + first
    to = pool + (page * PAGE + slot % block_size) * (KEY + VALUE)
    o_key, o_value = tl.arange(0, KEY_PADDED), tl.arange(0, VALUE_PADDED)
    m_key, m_value = o_key < tl.where(slot >= 0, KEY, 0), o_value < tl.where(slot >= 0, VALUE, 0)
    of_key = keys + i_request.to(tl.int64) * keys_stride_request + head * keys_stride_head
    of_value = values + i_request.to(tl.int64) * values_stride_request + head * values_stride_head
    b_key = _scaled(tl.load(of_key + o_key, mask=m_key), key_scale, IS_QUANTIZED)
    b_value = _scaled(tl.load(of_value + o_value, mask=m_value), value_scale, IS_QUANTIZED)
    tl.store(to + o_key, b_key.to(pool.dtype.element_ty), mask=m_key)
    tl.store(to + KEY + o_value, b_value.to(pool.dtype.element_ty), mask=m_value)
