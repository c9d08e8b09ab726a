"""The scheduler's state of one request."""

from dataclasses import dataclass, field

from vllm.v1.request import Request

from vllm_l2kv.capacity import Capacity
from vllm_l2kv.messages.usage import MEMORY_RATIO_DIGITS, KeptWhole, RequestUsage
from vllm_l2kv.policy import Compaction, CompactionPoints
from vllm_l2kv.scheduler.shared_prefixes import Prefixes


@dataclass
class RequestState:
    """An unfinished request whose numbers are reported.

    Attributes:
        request: vLLM's own state of the request.
        capacity: The engine's KV cache.
        points: The request's compactions; `None` if it is kept whole: ratio 1 without a budget, or streaming input.
        prefixes: The compacted prefixes of its prompt that it may share with other requests.
        reason: Why nothing will be evicted, unless a compaction happens; `None` if the request asks for no compression.
        max_tokens: Bound on the answer because the cache cannot hold a longer one, if the request gave no bound.
        begins_with: The compaction whose rows it found in the cache when it last began; `None` if it found none.
        num_found: Prompt tokens that it found compacted when it first began; `None` before that.
        is_counted: Whether the statistics have counted it as a compressed request.
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
    _last: Compaction | None = None  # last compaction that the request has passed
    _num_passed: int = 0

    def __post_init__(self) -> None:
        # Stored, since every output of the request needs it.
        self._coming = self.points.after(None) if self.points else None

    def usage(self) -> RequestUsage:
        """The request's numbers at the current length of its answer, whenever the engine carries compactions out."""
        num_prompt_tokens = self.request.num_prompt_tokens
        num_computed = max(self.request.num_tokens - 1, num_prompt_tokens)  # the last token was never an input
        # A compaction happens only if another token is computed after it.
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
