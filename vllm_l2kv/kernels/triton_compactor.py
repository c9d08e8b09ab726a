"""Compaction on a GPU: a few launches for all layers, heads and requests of a KV-cache group in one step.

    score    the rows held, read from the paged cache, by the kernels of each scorer (`kernels.scores`)
    finish   pool scores over blocks of tokens, if the granularity is `block`
    select   each head's kept positions, ascending
    move     kept rows into the destination blocks

Orders with the same scorer and granularity share launches. The number of launches depends on neither layers nor heads,
so it stays small and the host never waits for a full launch queue. Knows nothing of vLLM.
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
        cache: The caches of the group.
        scorers: Scorers bound to the layers and heads of `cache`.
        group_id: The group's id in `GroupMove`.
        scratch: Memory for the longest request.
    """

    def __init__(self, cache: GroupCache, scorers: Scorers, group_id: int, scratch: Scratch) -> None:
        self.cache = cache
        self.group_id = group_id
        self._kernels = bind(scorers)
        self._scratch = scratch
        self._capacity = scratch.scores.numel() // cache.num_selections

    def compact(self, orders: Sequence[CompactionOrder]) -> None:
        """Launches the kernels for a step's orders, which are independent of each other."""
        for _, alike in groupby(sorted(orders, key=_scorer_and_granularity), _scorer_and_granularity):
            for batch in self._batches(alike):
                self._launch(batch)

    def warm_up(self) -> None:
        """Compiles every kernel that a request can use, so that no request waits; compacts only the null block."""
        block_size = self.cache.block_size
        names = [name for name in self._kernels if name in OFFERED_SCORERS]
        lengths = {min(tile, self._capacity) for tile in TILES}
        for scorer, granularity, num_rows in product(names, GRANULARITIES, lengths):
            params = CompressionParams(protect_first=0, protect_last=0, scorer=scorer, granularity=granularity)
            move = GroupMove(self.group_id, (0,) * -(-num_rows // block_size), (0,))
            counts = {"num_rows": num_rows, "num_keep": 1, "num_evicted": num_rows - 1}
            self._launch([CompactionOrder(req_id="", params=params, moves=(move,), **counts)])

    def _batches(self, orders: Iterable[CompactionOrder]) -> Iterator[list[CompactionOrder]]:
        """Divides orders into batches that fit in the scratch memory."""
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
        """Carries out orders with the same scorer and granularity."""
        scorer, granularity = _scorer_and_granularity(orders[0])
        batch = Batch.of(self.cache, orders, self.group_id)
        scores, work = self._scratch
        is_pooled = granularity != "token"
        self._kernels[scorer].write(batch, scores, work, raw=is_pooled)
        if is_pooled:
            finish(batch, scores, granularity)
        select_positions(batch, scores)
        move_rows(batch, scores)


def _scorer_and_granularity(order: CompactionOrder) -> tuple[str, str]:
    """Scorer and granularity of an order."""
    return order.params.scorer, order.params.granularity
