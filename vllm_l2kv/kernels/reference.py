"""Compaction in plain torch, written for readability.

Works on *views* of a layer's cache in which `keys[block, head, slot]` and `values[block, head, slot]` are rows. The
caller makes the views from the backend's memory layout (see `vllm_l2kv.worker.rows`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_l2kv.messages.orders import CompactionOrder, GroupMove
from vllm_l2kv.scorers import Rows, Scorer, Scorers
from vllm_l2kv.token_groups import pool_scores


class LayerRows(NamedTuple):
    """One layer's cache as rows. Views: writing to them writes the cache.

    Attributes:
        keys: `[num_blocks, num_kv_heads, block_size, head_size]`.
        values: `[num_blocks, num_kv_heads, block_size, head_size_v]`.
        dtype: Type of the elements if the cache's tensors hold bytes (fp8); `None` for the tensors' own type.
    """

    keys: torch.Tensor
    values: torch.Tensor
    dtype: torch.dtype | None = None

    def seen(self, keys: torch.Tensor, values: torch.Tensor, layer: int, first_head: int = 0) -> Rows:
        """The `Rows` of a scorer, from rows that were read from this layer; shapes and indices as in `Rows`."""
        return Rows(keys.view(self.dtype or keys.dtype), values.view(self.dtype or values.dtype), layer, first_head)


def ranked(scores: torch.Tensor, protect_first: int = 0, protect_last: int = 0) -> torch.Tensor:
    """Positions in the order in which each head keeps them: the protected ones, then the best scores.

    Args:
        scores: `[num_kv_heads, n]` fp32, higher is kept sooner. Ties go to the lower position, NaN comes last.
        protect_first: Positions at the start that are always kept.
        protect_last: Positions at the end that are always kept.

    Returns:
        `[num_kv_heads, n]` int64.
    """
    n = scores.shape[-1]
    # Infinity is reserved for protected positions.
    scores = scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    scores[:, :protect_first] = torch.inf
    scores[:, max(n - protect_last, 0) :] = torch.inf
    # A stable sort keeps equal scores in the order of their positions; topk promises nothing about ties.
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def select(scores: torch.Tensor, num_keep: int, protect_first: int = 0, protect_last: int = 0) -> torch.Tensor:
    """Positions that each head keeps.

    Args:
        scores: See `ranked`.
        num_keep: Number of positions to keep, `protect_first + protect_last <= num_keep <= n` unless all n are kept.
        protect_first: See `ranked`.
        protect_last: See `ranked`.

    Returns:
        `[num_kv_heads, num_keep]` int64, ascending in each head.
    """
    return ranked(scores, protect_first, protect_last)[:, :num_keep].sort(dim=-1).values


class ReferenceCompactor:
    """Carries out the orders of one KV-cache group, one layer and one request at a time.

    Args:
        group_id: The group's id in `GroupMove`.
        layers: The caches of the group's layers.
        scorers: Scorers bound to these layers, in the same order.
    """

    def __init__(self, group_id: int, layers: Sequence[LayerRows], scorers: Scorers) -> None:
        self._group_id = group_id
        self._layers = layers
        self._scorers = scorers

    @torch.inference_mode()
    def compact(self, orders: Sequence[CompactionOrder]) -> None:
        """Carries out the orders one after another."""
        for order in orders:
            scorer = self._scorers[order.params.scorer]
            for layer, rows in enumerate(self._layers):
                compact_layer(rows, layer, scorer, order, order.move_of(self._group_id))


def compact_layer(rows: LayerRows, layer: int, scorer: Scorer, order: CompactionOrder, move: GroupMove) -> None:
    """Gathers one layer's kept rows of one request into the destination blocks.

    Kept rows stay in the order of their positions. Slots after them in the last block are zeroed. All rows are read
    before any is written, so destination blocks may be among the source blocks.

    Args:
        rows: The layer's cache.
        layer: Index of the layer in `Heads.layers` of `scorer`.
        scorer: The scorer that the order's params name.
        order: The order to carry out.
        move: The blocks of the layer's group; `destination` has room for `num_keep` rows.

    Raises:
        ValueError: The scorer, one of the user's own, returned scores of another shape than `[num_kv_heads, num_rows]`.
    """
    source, destination = (torch.tensor(blocks, device=rows.keys.device) for blocks in (move.source, move.destination))
    params = order.params
    keys, values = read(rows.keys, source, order.num_rows), read(rows.values, source, order.num_rows)
    scores = scorer.score(rows.seen(keys, values, layer))
    if scores.shape != keys.shape[:2]:
        raise ValueError(
            f"scorer {params.scorer} must return a score for each head and row, {list(keys.shape[:2])}, got "
            f"{list(scores.shape)}."
        )
    scores = pool_scores(scores, params.granularity)
    kept = select(scores, order.num_keep, params.protect_first, params.protect_last)
    _write(rows.keys, destination, _take(keys, kept))
    _write(rows.values, destination, _take(values, kept))


def read(cache: torch.Tensor, blocks: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Rows of a block table in slot order: `[num_kv_heads, num_tokens, head_size]`, a copy."""
    return cache[blocks].transpose(0, 1).flatten(1, 2)[:, :num_tokens]


def _take(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Each head's own rows: `[num_kv_heads, num_positions, head_size]`."""
    return rows.gather(1, positions.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def _write(cache: torch.Tensor, blocks: torch.Tensor, rows: torch.Tensor) -> None:
    """Packs `[num_kv_heads, num_rows, head_size]` into blocks, zeroing the slots after them."""
    num_kv_heads, num_rows, head_size = rows.shape
    packed = rows.new_zeros(num_kv_heads, blocks.shape[0] * cache.shape[2], head_size)
    packed[:, :num_rows] = rows
    cache[blocks] = packed.view(num_kv_heads, blocks.shape[0], cache.shape[2], head_size).transpose(0, 1)
