"""Orders from the scheduler to the worker: compact a request, from its source blocks into destination blocks.

An order holds block ids and counts only. The device selects the kept tokens, and the selection never leaves it. The
worker reports how long compactions took. A request that begins on rows that another request compacted needs no order,
only its number of evicted tokens.
"""

from collections.abc import Mapping
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

    `destination` either shares no block with `source` (fresh blocks), or consists of the first blocks of `source`,
    which then only this request holds (in place). Within one step, no destination block of one order occurs in another.
    """

    group_id: int
    source: tuple[int, ...]
    destination: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CompactionOrder:
    """The compaction of one request, to be carried out before the step's forward pass.

    Attributes:
        req_id: vLLM's request id.
        num_rows: Rows that each head holds: the first slots of the source blocks, all of them candidates for eviction.
        num_keep: Rows that each head keeps.
        num_evicted: Difference between position and slot of every later token.
        params: The request's params; protection, scorer and granularity decide which tokens are kept.
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


def attach_orders(scheduler_output: Any, orders: tuple[CompactionOrder, ...]) -> None:
    """Puts orders on a step's `SchedulerOutput`.

    vLLM's dataclass has no spare field; an extra attribute survives both in-process executors and pickling.
    """
    setattr(scheduler_output, _ATTRIBUTE, orders)


def orders_of(scheduler_output: Any) -> tuple[CompactionOrder, ...]:
    """The orders of a step; empty if the scheduler attached none."""
    orders: tuple[CompactionOrder, ...] = getattr(scheduler_output, _ATTRIBUTE, ())
    return orders


def attach_compacted_hits(scheduler_output: Any, hits: Mapping[str, int]) -> None:
    """Puts on a step's `SchedulerOutput` the ids of requests that begin on compacted rows, and their evicted tokens."""
    setattr(scheduler_output, _HITS, hits)


def compacted_hits_of(scheduler_output: Any) -> Mapping[str, int]:
    """Ids of the requests that begin on compacted rows in a step, with their evicted tokens; usually empty."""
    hits: Mapping[str, int] = getattr(scheduler_output, _HITS, {})
    return hits


def with_seconds(model_runner_output: Any, seconds: list[float]) -> Any:
    """A copy of a step's `ModelRunnerOutput` with seconds of compactions, possibly of an earlier step.

    A copy, since vLLM returns the same object for all steps without work.
    """
    output = copy(model_runner_output)
    setattr(output, _SECONDS, seconds)
    return output


def seconds_of(model_runner_output: Any) -> list[float]:
    """Seconds of compactions; usually empty."""
    seconds: list[float] = getattr(model_runner_output, _SECONDS, [])
    return seconds
