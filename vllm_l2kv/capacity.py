"""Whether a request can ever fit the KV cache, and how much less of it a compressed request holds.

vLLM lets a request that cannot wait for ever, and those after it too. It never meets one, since it refuses a context
longer than its cache; with a default budget we take such a context. Plain integers: no vLLM.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.policy import CompactionPoints


class DoesNotFitError(ValueError):
    """A request that the KV cache cannot hold even alone; the message has the numbers.

    Attributes:
        param: The field that would help.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class GroupCapacity:
    """What one KV-cache group needs of a request.

    Attributes:
        block_size: Tokens in a block.
        compressed: Whether its layers are compacted.
        max_blocks: Blocks that a request holds at most, for a sliding window or a recurrent state; `None` for others.
    """

    block_size: int
    compressed: bool
    max_blocks: int | None = None

    def num_blocks(self, num_tokens: int, num_rows: int) -> int:
        """Blocks for computed tokens of which compressed layers hold `num_rows`."""
        needed = num_blocks_for(num_rows if self.compressed else num_tokens, self.block_size)
        return needed if self.max_blocks is None else min(needed, self.max_blocks)


@dataclass(frozen=True)
class Capacity:
    """An engine's KV cache.

    Attributes:
        num_blocks: Blocks that requests may hold.
        groups: Its KV-cache groups, which share the blocks.
        max_model_len: Tokens of the longest request.
        num_drafts: Draft tokens that need slots beside a request's own.
        compressed_bytes: Bytes of a token in all heads that compact, on one tensor-parallel rank.
        full_bytes: The same in all full heads; neither counts sliding windows and recurrent states.
    """

    num_blocks: int
    groups: tuple[GroupCapacity, ...]
    max_model_len: int
    num_drafts: int = 0
    compressed_bytes: int = 1
    full_bytes: int = 0

    def as_plain(self) -> dict[str, Any]:
        """A form of plain values, for the way from a worker to the front end."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Reads that form."""
        return cls(**{**plain, "groups": tuple(GroupCapacity(**group) for group in plain["groups"])})

    def num_held(self, num_tokens: int, num_rows: int) -> int:
        """Blocks for computed tokens, of which compressed layers hold `num_rows`, and for drafts beside them."""
        num_tokens = min(num_tokens + self.num_drafts, self.max_model_len)
        num_rows = min(num_rows + self.num_drafts, num_tokens)
        return sum(group.num_blocks(num_tokens, num_rows) for group in self.groups)

    def memory_ratio(self, num_tokens: int, num_rows: int) -> float:
        """Memory of the whole cache that a request holds, over what it would hold if nothing were evicted.

        Counts rows, not blocks. Sliding windows and recurrent states are left out, since they are held either way.

        Args:
            num_tokens: Tokens in full layers, at least 1.
            num_rows: Rows of them that compressed layers hold.
        """
        held = self.compressed_bytes * num_rows + self.full_bytes * num_tokens
        return held / ((self.compressed_bytes + self.full_bytes) * num_tokens)

    def max_tokens(self, num_prompt_tokens: int, max_tokens: int, points: CompactionPoints | None) -> int:
        """The bound that the answer of a request gets: its own, if the cache can hold so many tokens.

        A bound that is all the rest of the context is what vLLM sets where the request names none. Such a request gets
        what fits.

        Args:
            num_prompt_tokens: Length of its prompt.
            max_tokens: Its own bound.
            points: Its compactions; `None` if it is kept whole.

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
        """Blocks without which vLLM might not admit a request, or not again after a preemption.

        It asks for the most that each group holds, even if groups hold it at different times.
        """
        num_tokens = num_prompt_tokens + max_tokens - 1  # the last token of an answer is never computed on
        return self.num_held(num_tokens, num_tokens if points is None else points.max_rows(num_tokens))
