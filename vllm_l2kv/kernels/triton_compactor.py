"""Compaction on a GPU: a few launches for all layers, heads and requests of a KV-cache group in one step.

    scores   of the rows held, straight from the paged cache, by the kernels of each scorer (`kernels.scores`)
    finish   means of scores over blocks of tokens, if a request asks for them
    select   each head's kept positions, ascending
    move     kept rows into the destination blocks

Orders of one scorer and granularity go together. How many launches there are depends on neither layers nor heads, so
the host never waits for room in the device's queue. Knows nothing of vLLM.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, product

from vllm_l2kv.kernels.batch import Batch
from vllm_l2kv.kernels.finish import finish
from vllm_l2kv.kernels.group_cache import GroupCache
from vllm_l2kv.kernels.scores import bind
from vllm_l2kv.kernels.scratch import MAX_ORDERS, Scratch
from vllm_l2kv.kernels.select_and_move import TILES, move_rows, select_positions
from vllm_l2kv.messages.orders import CompactionOrder, GroupMove
from vllm_l2kv.params import GRANULARITIES, OFFERED_SCORERS, CompressionParams
from vllm_l2kv.scorers import Scorers


class TritonCompactor:
    """Carries out the orders of one KV-cache group.

    Args:
        cache: The group's caches.
        scorers: Bound to their layers and heads.
        group_id: Its id in `GroupMove`.
        scratch: Has room for the longest request.
    """

    def __init__(self, cache: GroupCache, scorers: Scorers, group_id: int, scratch: Scratch) -> None:
        self.cache = cache
        self.group_id = group_id
        self._kernels = bind(scorers)
        self._scratch = scratch
        self._capacity = scratch.scores.numel() // cache.num_selections

    def compact(self, orders: Sequence[CompactionOrder]) -> None:
        """Launches the kernels. The orders of a step may be carried out in any sequence."""
        for _, alike in groupby(sorted(orders, key=_way), _way):
            for batch in self._batches(alike):
                self._launch(batch)

    def warm_up(self) -> None:
        """Compiles every kernel that a request can reach, so that none waits for that; moves the null block."""
        block_size = self.cache.block_size
        names = [name for name in self._kernels if name in OFFERED_SCORERS]
        lengths = {min(tile, self._capacity) for tile in TILES}
        for scorer, granularity, num_rows in product(names, GRANULARITIES, lengths):
            params = CompressionParams(protect_first=0, protect_last=0, scorer=scorer, granularity=granularity)
            move = GroupMove(self.group_id, (0,) * -(-num_rows // block_size), (0,))
            counts = {"num_rows": num_rows, "num_keep": 1, "num_evicted": num_rows - 1}
            self._launch([CompactionOrder(req_id="", params=params, moves=(move,), **counts)])

    def _batches(self, orders: Iterable[CompactionOrder]) -> Iterator[list[CompactionOrder]]:
        """As many orders at a time as the scratch memory holds."""
        batch: list[CompactionOrder] = []
        num_rows = 0
        for order in orders:
            if batch and (num_rows + order.num_rows > self._capacity or len(batch) == MAX_ORDERS):
                yield batch
                batch, num_rows = [], 0
            batch.append(order)
            num_rows += order.num_rows
        yield batch

    def _launch(self, orders: Sequence[CompactionOrder]) -> None:
        """Carries out orders of one scorer and granularity."""
        scorer, granularity = _way(orders[0])
        batch = Batch.of(self.cache, orders, self.group_id)
        scores, work = self._scratch
        is_pooled = granularity != "token"
        self._kernels[scorer].write(batch, scores, work, raw=is_pooled)
        if is_pooled:
            finish(batch, scores, granularity)
        select_positions(batch, scores)
        move_rows(batch, scores)


def _way(order: CompactionOrder) -> tuple[str, str]:
    """By what rows are chosen."""
    return order.params.scorer, order.params.granularity
