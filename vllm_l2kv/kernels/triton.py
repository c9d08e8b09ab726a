"""Compaction on a GPU: three launches for all layers, heads and requests of a KV-cache group in one step.

    score    norms of the prompt's keys, straight from the paged cache; other scorers than `l2`, and other granularities
             than `token`, are left to torch
    select   each head's kept positions, ascending
    move     kept rows, then rows of generated tokens, into the destination blocks

Equals `vllm_l2kv.kernels.reference`. Knows nothing of vLLM. Names: `i_` program index, `o_` offsets, `m_` mask, `b_`
loaded values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.reference import LayerRows, ranked, read
from vllm_l2kv.messages.orders import CompactionOrder, GroupMove
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.scorers import scorer_of
from vllm_l2kv.token_groups import at_granularity

SCORE_ROWS = 32
SELECT_TILES = (1024, 4096)
"""Scores that a program of `_select_kernel` reads at once: the first for prompts that fit it, else the last."""
MOVE_ROWS = 64
MOVE_SPLIT = 32
NUM_ORDER_FIELDS = 9
NOTHING_PROTECTED = CompressionParams(protect_first=0, protect_last=0)
"""To warm up with: one row of any prompt may be kept."""
TORCH_BYTES = 128 << 20
"""Memory that torch's scorers may take, if one head at a time fits it."""
TORCH_COPIES = 8
"""What they take at most, in copies of the keys in fp32."""


@dataclass(frozen=True)
class GroupCache:
    """The caches of a group's compressed layers, alike but for their address.

    Attributes:
        layers: One view a layer, `[num_blocks, num_kv_heads, block_size, content]`; a row is contiguous and holds
            the key, then the value.
        head_size: Elements of a key.
        key_dtype: What the elements of a key are; a quantized cache is a tensor of bytes.
        pointers: `[num_layers]` int64, addresses of the views.
    """

    layers: tuple[torch.Tensor, ...]
    head_size: int
    key_dtype: torch.dtype
    pointers: torch.Tensor

    @classmethod
    def of(cls, layers: Sequence[torch.Tensor], head_size: int, key_dtype: torch.dtype | None = None) -> "GroupCache":
        """Checks that the layers are alike.

        Args:
            layers: As the attribute.
            head_size: As the attribute.
            key_dtype: As the attribute; `None` for the tensors' own type.

        Raises:
            ValueError: Shapes, strides or types differ, or rows are not contiguous.
        """
        first = layers[0]
        for layer in layers:
            if (layer.shape, layer.stride(), layer.dtype) != (first.shape, first.stride(), first.dtype):
                raise ValueError("layers of a KV-cache group differ in shape, strides or type")
        if first.stride(3) != 1:
            raise ValueError("rows of the KV cache are not contiguous")
        pointers = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.int64, device=first.device)
        return cls(tuple(layers), head_size, key_dtype or first.dtype, pointers)

    @property
    def num_rows_per_token(self) -> int:
        """Layers times heads: selections that one prompt takes."""
        return len(self.layers) * self.layers[0].shape[1]


def scratch_bytes(num_rows_per_token: int, max_num_tokens: int) -> int:
    """Device memory of scores: four bytes for each key of the longest prompt."""
    return 4 * num_rows_per_token * max_num_tokens


def torch_bytes_of_a_head(head_size: int, num_tokens: int) -> int:
    """Device memory that torch's scorers take for one head of one prompt."""
    return TORCH_COPIES * 4 * head_size * num_tokens


class GroupCompactor:
    """Carries out the orders of one KV-cache group.

    Args:
        cache: The group's caches.
        group_id: Its id in `GroupMove`.
        max_num_tokens: Longest prompt; one such prompt always fits the scratch memory.
    """

    def __init__(self, cache: GroupCache, group_id: int, max_num_tokens: int) -> None:
        self.cache = cache
        self.group_id = group_id
        # Norms as sortable integers, then the kept positions in the same place.
        num_bytes = scratch_bytes(cache.num_rows_per_token, max_num_tokens)
        self._scratch = torch.empty(num_bytes // 4, dtype=torch.int32, device=cache.pointers.device)

    def compact(self, orders: Sequence[CompactionOrder]) -> None:
        """Launches the kernels; several orders at a time, as many as the scratch memory holds."""
        capacity = self._scratch.numel() // self.cache.num_rows_per_token
        batch: list[CompactionOrder] = []
        num_tokens = 0
        for order in orders:
            if batch and num_tokens + order.num_prompt_tokens > capacity:
                self._launch(batch)
                batch, num_tokens = [], 0
            batch.append(order)
            num_tokens += order.num_prompt_tokens
        if batch:
            self._launch(batch)

    def warm_up(self) -> None:
        """Compiles the kernels for every length of prompts, so that no request waits for that; moves the null block."""
        block_size = self.cache.layers[0].shape[2]
        capacity = self._scratch.numel() // self.cache.num_rows_per_token
        for num_tokens in {min(tile, capacity) for tile in SELECT_TILES}:
            source = (0,) * triton.cdiv(num_tokens, block_size)
            move = GroupMove(self.group_id, source, (0,))
            counts = {"num_prompt_tokens": num_tokens, "num_keep": 1, "num_tokens": num_tokens}
            self._launch([CompactionOrder(req_id="", params=NOTHING_PROTECTED, moves=(move,), **counts)])

    def _launch(self, orders: Sequence[CompactionOrder]) -> None:
        cache = self.cache
        layer = cache.layers[0]
        num_kv_heads, block_size, content = layer.shape[1:]
        table = self._table(orders)
        longest = max(order.num_prompt_tokens for order in orders)
        num_selections = cache.num_rows_per_token
        strides = layer.stride()[:3]
        _score_kernel[(triton.cdiv(longest, SCORE_ROWS), num_selections, len(orders))](
            cache.pointers, layer.view(cache.key_dtype), table, self._scratch, *strides, num_kv_heads, block_size,
            HEAD_SIZE=cache.head_size, HEAD_PADDED=triton.next_power_of_2(cache.head_size),
            ORDER_FIELDS=NUM_ORDER_FIELDS, ROWS=SCORE_ROWS,
        )  # fmt: skip
        firsts = accumulate((order.num_prompt_tokens for order in orders), initial=0)
        for order, first in zip(orders, firsts, strict=False):
            if (order.params.scorer, order.params.granularity) != ("l2", "token"):
                self._rank(order, first * num_selections)
        _select_kernel[(len(orders), num_selections)](
            table, self._scratch, ORDER_FIELDS=NUM_ORDER_FIELDS,
            TILE=SELECT_TILES[0 if longest <= SELECT_TILES[0] else -1],
        )  # fmt: skip
        _move_kernel[(len(orders), num_selections, MOVE_SPLIT)](
            cache.pointers, layer, table, self._scratch, *strides, num_kv_heads, block_size,
            CONTENT=content, CONTENT_PADDED=triton.next_power_of_2(content),
            ORDER_FIELDS=NUM_ORDER_FIELDS, ROWS=MOVE_ROWS, SPLIT=MOVE_SPLIT,
        )  # fmt: skip

    def _rank(self, order: CompactionOrder, first: int) -> None:
        """Puts ranks in the place of one order's norms, which begin at `first`; as many heads at once as memory allows.

        What is selected by the lowest ranks is what the reference selects by the highest scores.
        """
        cache, n, params = self.cache, order.num_prompt_tokens, order.params
        score = scorer_of(params.scorer)
        blocks = _to_device(np.array(order.move_of(self.group_id).source, dtype=np.int64), self._scratch.device)
        ranks = _to_device(np.arange(1, n + 1, dtype=np.int32), self._scratch.device)
        num_kv_heads = cache.layers[0].shape[1]
        at_once = max(1, TORCH_BYTES // torch_bytes_of_a_head(cache.head_size, n))
        places = self._scratch[first:][: cache.num_rows_per_token * n].view(-1, num_kv_heads, n)
        for i_layer, (layer, place) in enumerate(zip(cache.layers, places, strict=True)):
            # A score is as long as a rank: scores wait in the ranks' place until all heads of the layer have theirs.
            # Their means take less memory than a scorer does for one head, and are made after it gave that back.
            scores = place.view(torch.float32)
            for head in range(0, num_kv_heads, at_once):
                heads, first_row = layer[:, head : head + at_once], i_layer * num_kv_heads + head
                keys, values = heads[..., : cache.head_size], heads[..., cache.head_size :]
                rows = LayerRows(keys, values, cache.key_dtype, first_row)
                scores[head : head + at_once] = score(rows.prompt(read(keys, blocks, n), read(values, blocks, n)))
            scores = at_granularity(scores, params.granularity)
            for scores_of_heads, place_of_heads in zip(scores.split(at_once), place.split(at_once), strict=True):
                kept = ranked(scores_of_heads, params.protect_first, params.protect_last)
                place_of_heads.scatter_(1, kept, ranks.expand(kept.shape))

    def _table(self, orders: Sequence[CompactionOrder]) -> torch.Tensor:
        """Everything the kernels must know of the orders, in one transfer.

        Returns:
            int32: `NUM_ORDER_FIELDS` numbers for each order, then all block ids.
        """
        fields: list[int] = []
        blocks: list[tuple[int, ...]] = []
        next_block = len(orders) * NUM_ORDER_FIELDS
        first_score = 0
        for order in orders:
            move = order.move_of(self.group_id)
            num_source, num_destination = len(move.source), len(move.destination)
            fields += [
                order.num_prompt_tokens,
                order.num_keep,
                order.num_tokens,
                order.params.protect_first,
                order.params.protect_last,
                next_block,
                next_block + num_source,
                num_destination,
                first_score,
            ]
            blocks += [move.source, move.destination]
            next_block += num_source + num_destination
            first_score += order.num_prompt_tokens
        table = np.fromiter(chain(fields, *blocks), dtype=np.int32, count=next_block)
        return _to_device(table, self._scratch.device)


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@triton.jit
def _row_base(pointers, like, i_layer):
    """Address of a layer's cache, as a pointer of the cache's element type."""
    # Rows are whole vectors apart from an aligned address; without the hint every element is loaded alone.
    return tl.multiple_of(tl.load(pointers + i_layer).to(like.dtype), 16)


@triton.jit
def _score_kernel(
    pointers,  # [num_layers] int64
    like,  # a tensor of the keys' type
    table,  # [num_orders * ORDER_FIELDS + num_blocks] int32
    scores,  # [num_selections * num_tokens] int32
    stride_block,
    stride_head,
    stride_slot,
    num_kv_heads,
    block_size,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ORDER_FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_tile, i_selection, i_order = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_layer, i_head = i_selection // num_kv_heads, i_selection % num_kv_heads
    order = table + i_order * ORDER_FIELDS
    num_prompt_tokens = tl.load(order)
    if i_tile * ROWS >= num_prompt_tokens:
        return
    protect_first, protect_last = tl.load(order + 3), tl.load(order + 4)
    source = table + tl.load(order + 5)
    first_score = tl.load(order + 8).to(tl.int64)

    o_token = i_tile * ROWS + tl.arange(0, ROWS)
    m_token = o_token < num_prompt_tokens
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
    m_protected = (o_token < protect_first) | (o_token >= num_prompt_tokens - protect_last)
    o_score = (first_score * tl.num_programs(1)) + i_selection.to(tl.int64) * num_prompt_tokens + o_token
    tl.store(scores + o_score, tl.where(m_protected, 0, b_bits), mask=m_token)


@triton.jit
def _select_kernel(
    table,  # [num_orders * ORDER_FIELDS + num_blocks] int32
    scores,  # [num_selections * num_tokens] int32; the kept positions replace the scores
    ORDER_FIELDS: tl.constexpr,
    TILE: tl.constexpr,
):
    i_order, i_selection = tl.program_id(0), tl.program_id(1)
    order = table + i_order * ORDER_FIELDS
    num_prompt_tokens, num_keep = tl.load(order), tl.load(order + 1)
    first_score = tl.load(order + 8).to(tl.int64)
    row = scores + first_score * tl.num_programs(1) + i_selection.to(tl.int64) * num_prompt_tokens

    # Bisection for the num_keep-th smallest score: the highest value with fewer than num_keep scores below it. The row
    # stays in the caches near the program. (A histogram a byte would need fewer passes, but norms share their upper
    # bytes, and atomics on one bin wait for each other.)
    lowest, highest = 0x7FFFFFFF, 0
    for start in range(0, num_prompt_tokens, TILE):
        o_token = start + tl.arange(0, TILE)
        m_token = o_token < num_prompt_tokens
        lowest = tl.minimum(lowest, tl.min(tl.load(row + o_token, mask=m_token, other=0x7FFFFFFF), axis=0))
        highest = tl.maximum(highest, tl.max(tl.load(row + o_token, mask=m_token, other=0), axis=0))
    while lowest < highest:
        middle = highest - (highest - lowest) // 2  # above lowest, so the interval shrinks
        num_below = 0
        for start in range(0, num_prompt_tokens, TILE):
            o_token = start + tl.arange(0, TILE)
            b_score = tl.load(row + o_token, mask=o_token < num_prompt_tokens, other=0x7FFFFFFF)
            num_below += tl.sum((b_score < middle).to(tl.int32), axis=0)
        if num_below < num_keep:
            lowest = middle
        else:
            highest = middle - 1
    threshold = lowest
    num_below = 0
    for start in range(0, num_prompt_tokens, TILE):
        o_token = start + tl.arange(0, TILE)
        b_score = tl.load(row + o_token, mask=o_token < num_prompt_tokens, other=0x7FFFFFFF)
        num_below += tl.sum((b_score < threshold).to(tl.int32), axis=0)
    remaining = num_keep - num_below
    # `remaining` of the scores equal to the threshold are kept: those of the lowest positions.

    num_taken = 0
    num_equal = 0
    for start in range(0, num_prompt_tokens, TILE):
        o_token = start + tl.arange(0, TILE)
        m_token = o_token < num_prompt_tokens
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
    table,  # [num_orders * ORDER_FIELDS + num_blocks] int32
    kept,  # [num_selections * num_tokens] int32
    stride_block,
    stride_head,
    stride_slot,
    num_kv_heads,
    block_size,
    CONTENT: tl.constexpr,
    CONTENT_PADDED: tl.constexpr,
    ORDER_FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    i_order, i_selection, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_layer, i_head = i_selection // num_kv_heads, i_selection % num_kv_heads
    order = table + i_order * ORDER_FIELDS
    num_prompt_tokens, num_keep, num_tokens = tl.load(order), tl.load(order + 1), tl.load(order + 2)
    source, destination = table + tl.load(order + 5), table + tl.load(order + 6)
    num_slots = tl.load(order + 7) * block_size
    first_score = tl.load(order + 8).to(tl.int64)
    row = kept + first_score * tl.num_programs(1) + i_selection.to(tl.int64) * num_prompt_tokens
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
        b_position = tl.where(m_kept, b_position, o_slot - num_keep + num_prompt_tokens)
        m_row = b_position < num_tokens
        b_block = tl.load(source + b_position // block_size, mask=m_row, other=0).to(tl.int64)
        o_from = b_block * stride_block + (b_position % block_size).to(tl.int64) * stride_slot
        b_row = tl.load(base + o_from[:, None] + o_content[None, :], mask=m_row[:, None] & m_content, other=0)

        m_slot = o_slot < num_slots
        b_block = tl.load(destination + o_slot // block_size, mask=m_slot, other=0).to(tl.int64)
        o_to = b_block * stride_block + (o_slot % block_size).to(tl.int64) * stride_slot
        tl.debug_barrier()
        tl.store(base + o_to[:, None] + o_content[None, :], b_row, mask=m_slot[:, None] & m_content)
