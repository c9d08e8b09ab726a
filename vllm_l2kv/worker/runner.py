"""What the worker asks of a runner, whichever of vLLM's two it adapts: `runner_v1` or `runner_v2`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from vllm_l2kv.messages.orders import CompactionOrder


class Counts(Protocol):
    """Evicted tokens of compacted requests."""

    def by_request(self) -> dict[str, int]:
        """Request ids to numbers of tokens."""


class Runner(Protocol):
    """What changes for vLLM's model runner when a request is compacted."""

    @property
    def counts(self) -> Counts:
        """What kernels read, or a copy of it."""

    def zero(self, block_ids: Sequence[int]) -> None:
        """Sets blocks of attention layers to zero on the device, as vLLM does with those that it gives to a request.

        Only where vLLM does: a cache that also holds states, whose bytes read as keys or values may be no numbers.
        """

    def begin_step(self, gone: Iterable[str], orders: Sequence[CompactionOrder], hits: Mapping[str, int]) -> None:
        """Updates what the step's kernels will read; called once a step, before vLLM prepares it.

        Args:
            gone: Requests that finished, were aborted or preempted; those never compacted may be among them.
            orders: The step's compactions, of other requests; their slots are `position - num_evicted` from now on.
            hits: Requests that begin in this step on rows which another one has compacted, to evicted slots. They may
                be among `gone`, preempted just before.
        """
