"""Pools scores over tokens, before the tokens that a head keeps are chosen by them.

With `token` each token of a head has its own score. With `neighbors` it has the mean over itself and the tokens beside
it: a number or a name takes several tokens, and it is lost if one of them is evicted. SnapKV (Li et al., arXiv
2404.14469, section 4) pools its scores for the same reason.

With `block` a block of tokens in all compressed heads of a layer has one score, and is kept or evicted as one. A block
is `TOKENS_PER_BLOCK` consecutive tokens, counted from the start of the prompt. It is not a block of the cache, whose
size depends on the device: the choice of tokens must not depend on the device.
"""

import torch
from torch.nn.functional import avg_pool1d

from vllm_l2kv.params import NEIGHBORS, TOKENS_PER_BLOCK


def pool_scores(scores: torch.Tensor, granularity: str) -> torch.Tensor:
    """Pools the scores of one layer.

    With `neighbors` each score becomes the mean over the rows of its head from `NEIGHBORS` before it to `NEIGHBORS`
    after it; the first and the last rows have fewer. After a compaction, the rows beside a row are those that were
    kept. With `block` each score becomes the mean over the tokens of its block (the last block may be shorter) and over
    the heads of this tensor-parallel rank, so ranks need not communicate. A NaN makes each mean over it NaN, which
    ranks last.

    Args:
        scores: `[num_kv_heads, n]` fp32, all compressed heads of the layer.
        granularity: One of `vllm_l2kv.params.GRANULARITIES`.

    Returns:
        `[num_kv_heads, n]` fp32; `scores` themselves with `token`, the same row for every head with `block`.
    """
    # In fp64 the sum of finite scores is finite, and the order of summation does not change the fp32 result.
    if granularity == "token":
        return scores
    if granularity == "neighbors":
        width = 2 * NEIGHBORS + 1
        return avg_pool1d(scores.double(), width, stride=1, padding=NEIGHBORS, count_include_pad=False).float()
    of_tokens = scores.mean(dim=0, keepdim=True, dtype=torch.float64)
    of_blocks = avg_pool1d(of_tokens, TOKENS_PER_BLOCK, ceil_mode=True).float()
    return of_blocks.repeat_interleave(TOKENS_PER_BLOCK, dim=1)[:, : scores.shape[1]].expand_as(scores)
