"""Requests that write rows, are compacted to their budget and continue, and the positions that each head then holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vllm_l2kv.kernels.reference import read
from vllm_l2kv.messages.orders import CompactionOrder, GroupMove
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.scorers import Rows, Scorers


@dataclass
class Life:
    """One request in a cache, and the rows that it should hold there.

    Attributes:
        cache: `[num_layers, num_blocks, num_kv_heads, block_size, 2 * head_size]`, keys before values.
        contents: Rows of each position in the cache's type, `[num_layers, num_kv_heads, num_positions, 2 * head_size]`.
        params: Parameters with a budget.
        scorers: Scorers bound to the cache's layers and heads.
        interval: Number of rows beyond the budget at which it is compacted.
        free: Blocks of the cache that no request holds.
        table: Blocks of the request.
        num_evicted: Number of positions that each head has evicted.
        held: Positions in the order of slots, `[num_layers, num_kv_heads, num_rows]`.
    """

    cache: torch.Tensor
    contents: torch.Tensor
    params: CompressionParams
    scorers: Scorers
    interval: int
    free: list[int]
    table: list[int] = field(default_factory=list)
    num_evicted: int = 0
    held: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.held = torch.empty(*self.contents.shape[:2], 0, dtype=torch.int64, device=self.cache.device)
        self.budget = self.params.max_tokens or 0

    def write(self) -> None:
        """Fills slots of the request until it holds its budget and an interval."""
        num_rows, size = self.held.shape[-1], self.cache.shape[3]
        for slot in range(num_rows, self.budget + self.interval):
            if slot == len(self.table) * size:
                self.table.append(self.free.pop())
            position = slot + self.num_evicted
            self.cache[:, self.table[slot // size], :, slot % size] = self.contents[:, :, position]
        coming = torch.arange(num_rows, self.budget + self.interval, device=self.cache.device) + self.num_evicted
        self.held = torch.cat([self.held, coming.expand(*self.held.shape[:2], -1)], dim=-1)

    def order(self, in_place: bool) -> CompactionOrder:
        """Returns an order to compact it, and updates the expected rows."""
        self.num_evicted += self.interval
        self.held = torch.stack([self._kept(index) for index in range(self.held.shape[0])])
        source, num_destination = tuple(self.table), -(-self.budget // self.cache.shape[3])
        self.table = list(source[:num_destination])
        if not in_place:
            self.table = [self.free.pop() for _ in range(num_destination)]
        self.free[:0] = [block for block in source if block not in self.table]
        return CompactionOrder(
            req_id="r",
            num_rows=self.budget + self.interval,
            num_keep=self.budget,
            num_evicted=self.num_evicted,
            params=self.params,
            moves=(GroupMove(0, source, tuple(self.table)),),
        )

    def check(self) -> None:
        """Checks the rows after a compaction, one by one."""
        first, end = self.params.protect_first, self.budget + self.num_evicted
        positions = torch.arange(end, device=self.cache.device)
        assert (self.held[..., :first] == positions[:first]).all()
        last = self.params.protect_last
        assert (self.held[..., self.budget - last :] == positions[end - last :]).all()
        slots = self.cache[:, self.table].transpose(1, 2).flatten(2, 3)
        where = self.held.unsqueeze(-1).expand(-1, -1, -1, slots.shape[-1])
        assert torch.equal(slots[:, :, : self.budget], self.contents.gather(2, where))
        assert not slots[:, :, self.budget :].any(), "slots after the kept rows are zeroed"

    def _kept(self, index: int) -> torch.Tensor:
        """Returns the positions that layer `index` keeps, `[num_kv_heads, budget]`."""
        held = self.held[index]
        num_kv_heads, num_rows = held.shape
        keys, values = self.cache[index].chunk(2, dim=-1)
        table = torch.tensor(self.table, device=self.cache.device)
        rows = Rows(read(keys, table, num_rows), read(values, table, num_rows), index)
        scores = self.scorers[self.params.scorer].score(rows).tolist()
        first, last = self.params.protect_first, num_rows - self.params.protect_last
        kept = []
        for head in range(num_kv_heads):
            order = sorted(range(num_rows), key=lambda slot: (first <= slot < last, -scores[head][slot], slot))
            kept.append(held[head, sorted(order[: self.budget])])
        return torch.stack(kept)


def check_lives(
    lives: Sequence[Life], compact: Callable[[Sequence[CompactionOrder]], None], ways: Sequence[bool]
) -> None:
    """Compacts requests of one cache together, once for each item of `ways`: in place or not."""
    for in_place in ways:
        for life in lives:
            life.write()
        compact([life.order(in_place) for life in lives])
        for life in lives:
            life.check()
