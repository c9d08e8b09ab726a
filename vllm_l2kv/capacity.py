"""Whether a request fits the KV cache at all, and what share of its uncompressed memory a request holds.

A request that can never fit would wait forever in vLLM, and block those after it. Stock vLLM rules it out by refusing a
`max_model_len` that exceeds the cache. With a default budget this plugin accepts such a `max_model_len`, so it checks
each request here. Plain integers: no vLLM.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.policy import CompactionPoints


class DoesNotFitError(ValueError):
    """The KV cache cannot hold the request even when it runs alone; the message gives the numbers.

    Attributes:
        param: Request field to change.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class GroupCapacity:
    """How many blocks of one KV-cache group a request needs.

    Attributes:
        block_size: Tokens per block.
        compressed: Whether the group's layers are compacted.
        max_blocks: Most blocks that a request holds, for sliding windows and recurrent states; `None` for no bound.
    """

    block_size: int
    compressed: bool
    max_blocks: int | None = None

    def num_blocks(self, num_tokens: int, num_rows: int) -> int:
        """Blocks that a request needs for `num_tokens` computed tokens, of which compressed layers hold `num_rows`."""
        needed = num_blocks_for(num_rows if self.compressed else num_tokens, self.block_size)
        return needed if self.max_blocks is None else min(needed, self.max_blocks)


@dataclass(frozen=True)
class Capacity:
    """An engine's KV cache.

    Attributes:
        num_blocks: Blocks that requests may hold.
        groups: Its KV-cache groups, which share the blocks.
        max_model_len: Most tokens in a request, prompt and answer together.
        num_drafts: Slots for draft tokens that each request needs in addition to its own.
        compressed_bytes: Bytes per token in all compressed heads, on one tensor-parallel rank, without sliding-window
            and recurrent layers.
        full_bytes: Bytes per token in all full heads, counted in the same way.
    """

    num_blocks: int
    groups: tuple[GroupCapacity, ...]
    max_model_len: int
    num_drafts: int = 0
    compressed_bytes: int = 1
    full_bytes: int = 0

    def as_plain(self) -> dict[str, Any]:
        """Plain values, to send from a worker to the front end."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of `as_plain`."""
        return cls(**{**plain, "groups": tuple(GroupCapacity(**group) for group in plain["groups"])})

    def num_held(self, num_tokens: int, num_rows: int) -> int:
        """Blocks that a request holds in all groups, slots for draft tokens included.

        Args:
            num_tokens: Computed tokens.
            num_rows: How many of them compressed layers hold.
        """
        num_tokens = min(num_tokens + self.num_drafts, self.max_model_len)
        num_rows = min(num_rows + self.num_drafts, num_tokens)
        return sum(group.num_blocks(num_tokens, num_rows) for group in self.groups)

    def memory_ratio(self, num_tokens: int, num_rows: int) -> float:
        """Memory that a request holds, divided by what it would hold if nothing were evicted.

        Counts rows, not blocks. Sliding windows and recurrent states are left out, since compression does not change
        them.

        Args:
            num_tokens: Tokens in full layers, at least 1.
            num_rows: How many of them compressed layers hold.
        """
        held = self.compressed_bytes * num_rows + self.full_bytes * num_tokens
        return held / ((self.compressed_bytes + self.full_bytes) * num_tokens)

    def max_tokens(self, num_prompt_tokens: int, max_tokens: int, points: CompactionPoints | None) -> int:
        """The longest answer that a request may get: its own `max_tokens`, if the cache can hold it.

        vLLM sets `max_tokens` to the rest of the context when the request gives none. Such a request gets as many
        tokens as fit.

        Args:
            num_prompt_tokens: Length of the prompt.
            max_tokens: The request's own bound.
            points: The request's compactions; `None` if it is kept whole.

        Raises:
            DoesNotFitError: The cache cannot hold the request.
        """
        if self._fits(num_prompt_tokens, max_tokens, points):
            return max_tokens
        longest, too_long = 0, max_tokens
        while too_long - longest > 1:
            middle = (longest + too_long) // 2
            longest, too_long = (
                (middle, too_long) if self._fits(num_prompt_tokens, middle, points) else (longest, middle)
            )
        if longest and num_prompt_tokens + max_tokens >= self.max_model_len:
            return longest
        needed = self._needed(num_prompt_tokens, max_tokens, points)
        budget = None if points is None else points.params.max_tokens
        raise DoesNotFitError(
            "max_tokens" if longest else "kv_max_tokens",
            f"A prompt of {num_prompt_tokens} tokens with max_tokens={max_tokens} and "
            f"{'no kv_max_tokens' if budget is None else f'kv_max_tokens={budget}'} needs {needed} blocks of the KV "
            f"cache, which has {self.num_blocks}; "
            + (f"max_tokens may be at most {longest} here" if longest else "not even one token of an answer fits")
            + f". {'Set' if budget is None else 'Lower'} kv_max_tokens{', or lower max_tokens.' if longest else '.'}",
        )

    def _fits(self, num_prompt_tokens: int, max_tokens: int, points: CompactionPoints | None) -> bool:
        return self._needed(num_prompt_tokens, max_tokens, points) <= self.num_blocks

    def _needed(self, num_prompt_tokens: int, max_tokens: int, points: CompactionPoints | None) -> int:
        """Blocks that a request needs so that vLLM can always admit it, also again after a preemption.

        vLLM asks for the maximum of each group, even if groups reach theirs at different times.
        """
        num_tokens = num_prompt_tokens + max_tokens - 1  # the last token of an answer is never an input
        return self.num_held(num_tokens, num_tokens if points is None else points.max_rows(num_tokens))
