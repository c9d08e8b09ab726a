"""How many of a prompt's tokens are kept: integers in, integer out.

The count depends on nothing but integers and the ratio, so the scheduler knows it without asking the worker, and
tensor-parallel ranks agree without communication.
"""

import math

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
