"""What the scheduler remembers of a request."""

from dataclasses import dataclass, field

from vllm.v1.request import Request

from vllm_l2kv.capacity import Capacity
from vllm_l2kv.messages.usage import MEMORY_RATIO_DIGITS, KeptWhole, RequestUsage
from vllm_l2kv.policy import Compaction, CompactionPoints
from vllm_l2kv.scheduler.shared_prefixes import Prefixes


@dataclass
class RequestState:
    """An unfinished request that reports its numbers.

    Attributes:
        request: vLLM's own state of it.
        capacity: The engine's KV cache.
        points: Its compactions; `None` if it is kept whole, at a ratio of 1 without a budget or as streaming input.
        prefixes: The compacted beginnings of its prompt that it shares with others.
        reason: Why nothing was evicted, as long as that is so; `None` if it asks for nothing.
        max_tokens: The bound that its answer got because the cache cannot hold a longer one, if it named none.
        begins_with: The compaction whose rows it found when it began, last of all if it was preempted; `None` if none.
        num_found: Tokens before that, from when it first began; `None` until then.
        is_counted: Whether the statistics have it among compressed requests.
    """

    request: Request
    capacity: Capacity
    points: CompactionPoints | None
    reason: KeptWhole | None
    max_tokens: int | None = None
    prefixes: Prefixes = field(default_factory=Prefixes)
    begins_with: Compaction | None = None
    num_found: int | None = None
    is_counted: bool = False
    _last: Compaction | None = None  # of those that the answer has passed
    _num_passed: int = 0

    def __post_init__(self) -> None:
        # Kept, since every output of the request asks for it.
        self._coming = self.points.after(None) if self.points else None

    def usage(self) -> RequestUsage:
        """The numbers at this length of its answer. They do not depend on when the engine carries compactions out."""
        num_prompt_tokens = self.request.num_prompt_tokens
        num_computed = max(self.request.num_tokens - 1, num_prompt_tokens)  # a token is computed to get the next one
        # A request is compacted before it computes its next token, and not at all if there is none.
        while self.points is not None and self._coming is not None and self._coming.position < num_computed:
            self._last, self._num_passed = self._coming, self._num_passed + 1
            self._coming = self.points.after(self._last)
        num_evicted = self._last.num_evicted if self._last else 0
        num_rows = num_computed - num_evicted
        usage = RequestUsage(
            prompt_tokens=num_prompt_tokens,
            kept_tokens=num_rows,
            evicted_tokens=num_evicted,
            compactions=self._num_passed,
            memory_ratio=round(self.capacity.memory_ratio(num_computed, num_rows), MEMORY_RATIO_DIGITS),
        )
        if self.max_tokens is not None:
            usage["max_tokens"] = self.max_tokens
        if self.num_found or (self.num_found is not None and self.points and self.points.params.prefix_tokens):
            usage["found_tokens"] = self.num_found
        if self._last is None and self.reason is not None:
            usage["reason"] = str(self.reason)
        return usage
