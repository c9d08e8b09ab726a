"""When a request is compacted, and how many rows are kept: integers in, integers out.

Both depend on nothing but the request's own length and parameters: not on the batch, the chunks of its prompt,
preemption or prefix-cache hits. So the scheduler knows them without asking the worker, tensor-parallel ranks agree
without communication, and an answer depends on its request alone.
"""

import math
from typing import NamedTuple

from vllm_l2kv.params import CompressionParams


def num_keep(num_prompt_tokens: int, params: CompressionParams) -> int:
    """Tokens of the prompt that each KV head of a compressed layer keeps.

    The ceiling is that of the authors' code (Devoto et al., arXiv 2406.11430); 1e-9 forgives products such as
    `0.1 * 30 == 3.0000000000000004`, which would otherwise keep one token too many.

    Args:
        num_prompt_tokens: Length n of the prompt, n >= 1.
        params: The request's ratio and protection.

    Returns:
        `min(n, max(ceil(keep_ratio * n - 1e-9), protect_first + protect_last, 1))`.
    """
    by_ratio = math.ceil(params.keep_ratio * num_prompt_tokens - 1e-9)
    return min(num_prompt_tokens, max(by_ratio, params.protect_first + params.protect_last, 1))


class Compaction(NamedTuple):
    """One compaction of a request.

    Attributes:
        position: It happens when exactly this many tokens are computed; the next token sees the kept rows.
        num_rows: Rows that each head of a compressed layer holds before it, all of them candidates for eviction.
        num_keep: Rows that each head keeps.
    """

    position: int
    num_rows: int
    num_keep: int

    @property
    def num_evicted(self) -> int:
        """Slots by which positions have moved forward after it."""
        return self.position - self.num_keep


def compaction_of(num_prompt_tokens: int, params: CompressionParams) -> Compaction | None:
    """The compaction of a request, at the end of its prompt; `None` if nothing would be evicted.

    Args:
        num_prompt_tokens: Length n of the prompt, n >= 1.
        params: The request's ratio and protection.
    """
    keep = num_keep(num_prompt_tokens, params)
    return Compaction(num_prompt_tokens, num_prompt_tokens, keep) if keep < num_prompt_tokens else None
