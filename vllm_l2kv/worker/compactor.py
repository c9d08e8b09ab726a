"""Moves kept rows of one step's orders, group by group."""

from collections.abc import Mapping, Sequence

import torch

from vllm_l2kv.kernels.reference import LayerRows, compact_layer
from vllm_l2kv.messages.orders import CompactionOrder


class ReferenceCompactor:
    """The torch reference, one layer and one request at a time.

    Args:
        rows: Compressed groups to their layers' caches.
    """

    def __init__(self, rows: Mapping[int, Sequence[LayerRows]]) -> None:
        self._rows = rows

    @torch.inference_mode()
    def compact(self, orders: Sequence[CompactionOrder]) -> None:
        """Carries the orders out in turn."""
        for order in orders:
            for move in order.moves:
                for rows in self._rows[move.group_id]:
                    compact_layer(rows, order, move)
