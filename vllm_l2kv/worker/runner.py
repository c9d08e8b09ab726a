"""Interface of the worker to vLLM's two model runners, which `runner_v1` and `runner_v2` adapt."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

from vllm_l2kv.messages.orders import CompactionOrder

NOTHING: Mapping[str, int] = MappingProxyType({})


class Step(NamedTuple):
    """What the adapters read of a step.

    Attributes:
        gone: Ids of requests that finished, were aborted or were preempted, compacted or not.
        orders: The step's compactions, none of a request in `gone`. From now on these requests have
            `slot = position - num_evicted`.
        hits: Ids of requests that begin on compacted rows in this step, with their evicted tokens. They may be in
            `gone` too, if they were preempted just before.
        num_scheduled: Ids of the step's requests, with the number of tokens that it computes.
    """

    gone: Collection[str] = ()
    orders: Sequence[CompactionOrder] = ()
    hits: Mapping[str, int] = NOTHING
    num_scheduled: Mapping[str, int] = NOTHING


class Counts(Protocol):
    """Evicted tokens of compacted requests."""

    def by_request(self) -> dict[str, int]:
        """Request ids to evicted tokens."""


class Runner(Protocol):
    """Adapts vLLM's model runner to compacted requests."""

    @property
    def counts(self) -> Counts:
        """The counts that kernels read, or a copy of them."""

    def begin_step(self, step: Step) -> None:
        """Updates the state that the step's kernels will read; called once per step, before vLLM prepares the step."""
