"""Orders from the scheduler to the worker: compact this request, from these blocks into those.

An order holds block ids and counts only. Which tokens are kept is decided on the device and never leaves it. The worker
reports back how long compactions took. A request that begins on rows which another one has compacted needs no order,
only its count.
"""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

from vllm_l2kv.params import CompressionParams

_ATTRIBUTE = "compactions"
_HITS = "compacted_hits"
_SECONDS = "compaction_seconds"


@dataclass(frozen=True)
class GroupMove:
    """Blocks of one KV-cache group before and after a compaction.

    `destination` either shares no block with `source` (fresh blocks) or is the beginning of `source`, blocks that only
    this request holds (in place). Within one step no block is a destination of one order and belongs to another.
    """

    group_id: int
    source: tuple[int, ...]
    destination: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CompactionOrder:
    """One request's compaction, to be carried out before anything else of the step.

    Attributes:
        req_id: vLLM's request id.
        num_rows: Rows that each head holds: the first slots of the source blocks, all of them candidates for eviction.
        num_keep: Rows that each head keeps.
        num_evicted: Slots by which every later position moves forward.
        params: What the request asks; its protection, scorer and granularity decide which tokens are kept.
        moves: One entry for each compressed group.
    """

    req_id: str
    num_rows: int
    num_keep: int
    num_evicted: int
    params: CompressionParams
    moves: tuple[GroupMove, ...]

    def move_of(self, group_id: int) -> GroupMove:
        """The move of one group."""
        (move,) = (move for move in self.moves if move.group_id == group_id)
        return move


def partly_filled(orders: Iterable[CompactionOrder]) -> list[int]:
    """Fresh blocks that compactions may fill in part only: the last one of each destination."""
    moves = (move for order in orders for move in order.moves)
    return [move.destination[-1] for move in moves if move.destination[-1] not in move.source]


def attach_orders(scheduler_output: Any, orders: tuple[CompactionOrder, ...]) -> None:
    """Puts orders on a step's `SchedulerOutput`.

    vLLM's dataclass has no spare field; an extra attribute survives both in-process executors and pickling.
    """
    setattr(scheduler_output, _ATTRIBUTE, orders)


def orders_of(scheduler_output: Any) -> tuple[CompactionOrder, ...]:
    """The orders of a step; none for a step of a scheduler that compacts nothing."""
    orders: tuple[CompactionOrder, ...] = getattr(scheduler_output, _ATTRIBUTE, ())
    return orders


def attach_compacted_hits(scheduler_output: Any, hits: Mapping[str, int]) -> None:
    """Puts on a step's `SchedulerOutput` which requests begin on compacted rows: their ids, to evicted slots."""
    setattr(scheduler_output, _HITS, hits)


def compacted_hits_of(scheduler_output: Any) -> Mapping[str, int]:
    """The requests of a step that begin on compacted rows, to evicted slots; mostly none."""
    hits: Mapping[str, int] = getattr(scheduler_output, _HITS, {})
    return hits


def with_seconds(model_runner_output: Any, seconds: list[float]) -> Any:
    """A step's `ModelRunnerOutput` with times of compactions, which may be those of an earlier step.

    A copy: vLLM returns one and the same object for all steps without work.
    """
    output = copy(model_runner_output)
    setattr(output, _SECONDS, seconds)
    return output


def seconds_of(model_runner_output: Any) -> list[float]:
    """Times of compactions, mostly none."""
    seconds: list[float] = getattr(model_runner_output, _SECONDS, [])
    return seconds
