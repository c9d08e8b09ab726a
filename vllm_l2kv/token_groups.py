"""The unit that is kept or evicted: one token of a head, or a block of tokens in all compressed heads of a layer.

A block is `TOKENS_PER_BLOCK` consecutive tokens, counted from the start of the prompt. It is not a block of the cache,
whose size depends on the device: the choice of tokens must not depend on the device.
"""

import torch
from torch.nn.functional import avg_pool1d

from vllm_l2kv.params import TOKENS_PER_BLOCK


def pool_scores(scores: torch.Tensor, granularity: str) -> torch.Tensor:
    """Pools the scores of one layer over the unit that is kept or evicted.

    With `token` scores are unchanged. With `block` each score becomes the mean over the tokens of its block (the last
    block may be shorter) and over the heads of this tensor-parallel rank, so ranks need not communicate. A NaN makes
    the score of its block NaN, which ranks last.

    Args:
        scores: `[num_kv_heads, n]` fp32, all compressed heads of the layer.
        granularity: One of `vllm_l2kv.params.GRANULARITIES`.

    Returns:
        `[num_kv_heads, n]` fp32, `scores` themselves or with the same row for every head.
    """
    if granularity == "token":
        return scores
    # In fp64 the sum of finite scores is finite, and the order of summation does not change the fp32 result.
    of_tokens = scores.mean(dim=0, keepdim=True, dtype=torch.float64)
    of_blocks = avg_pool1d(of_tokens, TOKENS_PER_BLOCK, ceil_mode=True).float()
    return of_blocks.repeat_interleave(TOKENS_PER_BLOCK, dim=1)[:, : scores.shape[1]].expand_as(scores)
