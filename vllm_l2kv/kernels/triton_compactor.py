"""Compaction on a GPU: three launches for all layers, heads and requests of a KV-cache group in one step.

    score    norms of a request's keys, straight from the paged cache; `torch_ranks` scores for other scorers than
             `l2`, and other granularities than `token`
    select   each head's kept positions, ascending
    move     kept rows into the destination blocks

Knows nothing of vLLM.
"""

from collections.abc import Sequence

import torch

from vllm_l2kv.kernels.group_cache import GroupCache
from vllm_l2kv.kernels.torch_ranks import write_ranks
from vllm_l2kv.kernels.triton import SELECT_TILES, move_rows, order_table, score_norms, select_positions
from vllm_l2kv.messages.orders import CompactionOrder, GroupMove
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.scorers import Scorers

NOTHING_PROTECTED = CompressionParams(protect_first=0, protect_last=0)
"""To warm up with: a single row may be kept."""


def scratch_bytes(num_rows_per_token: int, max_num_tokens: int) -> int:
    """Device memory of scores: four bytes for each key of the longest request."""
    return 4 * num_rows_per_token * max_num_tokens


class TritonCompactor:
    """Carries out the orders of one KV-cache group.

    Args:
        cache: The group's caches.
        scorers: Bound to their layers and heads.
        group_id: Its id in `GroupMove`.
        max_num_tokens: Rows of the longest request; it always fits the scratch memory.
    """

    def __init__(self, cache: GroupCache, scorers: Scorers, group_id: int, max_num_tokens: int) -> None:
        self.cache = cache
        self._scorers = scorers
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
            if batch and num_tokens + order.num_rows > capacity:
                self._launch(batch)
                batch, num_tokens = [], 0
            batch.append(order)
            num_tokens += order.num_rows
        if batch:
            self._launch(batch)

    def warm_up(self) -> None:
        """Compiles the kernels for every number of rows, so that no request waits for that; moves the null block."""
        block_size = self.cache.layers[0].shape[2]
        capacity = self._scratch.numel() // self.cache.num_rows_per_token
        for num_tokens in {min(tile, capacity) for tile in SELECT_TILES}:
            source = (0,) * -(-num_tokens // block_size)
            move = GroupMove(self.group_id, source, (0,))
            counts = {"num_rows": num_tokens, "num_keep": 1, "num_evicted": num_tokens - 1}
            self._launch([CompactionOrder(req_id="", params=NOTHING_PROTECTED, moves=(move,), **counts)])

    def _launch(self, orders: Sequence[CompactionOrder]) -> None:
        cache, scratch = self.cache, self._scratch
        rows, table = order_table(orders, self.group_id, scratch.device)
        longest = max(order.num_rows for order in orders)
        score_norms(cache, table, scratch, len(orders), longest)
        for order, row in zip(orders, rows, strict=True):
            if (order.params.scorer, order.params.granularity) != ("l2", "token"):
                n, num_selections = order.num_rows, cache.num_rows_per_token
                scores = scratch[row.first_score * num_selections :][: num_selections * n]
                blocks = table[row.source : row.destination].long()
                write_ranks(
                    scores.view(len(cache.layers), -1, n),
                    cache,
                    blocks,
                    order.params,
                    self._scorers[order.params.scorer],
                )
        select_positions(cache, table, scratch, len(orders), longest)
        move_rows(cache, table, scratch, len(orders))
