"""What is kept or evicted as one: a token of a head, or a block of tokens of all compressed heads of a layer.

A block is `TOKENS_PER_BLOCK` tokens of the prompt in a row, counted from its start. It is not a block of the cache: the
size of those depends on the device, and what is kept must not.
"""

import torch
from torch.nn.functional import avg_pool1d

from vllm_l2kv.params import TOKENS_PER_BLOCK


def pool_scores(scores: torch.Tensor, granularity: str) -> torch.Tensor:
    """The scores by which one layer's heads decide.

    With `token` they are unchanged. With `block` each is the mean over the tokens of its block, of which the last
    may be short, and over the heads: those of this tensor-parallel rank, so ranks need not communicate. One NaN makes
    its block NaN, which ranks last.

    Args:
        scores: `[num_kv_heads, n]` fp32, all compressed heads of the layer.
        granularity: One of `vllm_l2kv.params.GRANULARITIES`.

    Returns:
        `[num_kv_heads, n]` fp32, `scores` themselves or with the same row for every head.
    """
    if granularity == "token":
        return scores
    # In fp64 the sum of finite scores is finite, and the order of summation does not show in fp32.
    of_tokens = scores.mean(dim=0, keepdim=True, dtype=torch.float64)
    of_blocks = avg_pool1d(of_tokens, TOKENS_PER_BLOCK, ceil_mode=True).float()
    return of_blocks.repeat_interleave(TOKENS_PER_BLOCK, dim=1)[:, : scores.shape[1]].expand_as(scores)
