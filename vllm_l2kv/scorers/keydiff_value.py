"""Keys unlike the others, and large values: two ranks in one.

Ranks have no unit, so neither measure outweighs the other in any head. Source: `keydiff`, and the norm of values, by
which Guo et al., "Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also
Matters", arXiv 2406.12335, weigh attention. Their sum of ranks is of this project.

Both measures are ranked by their leading 16 bits, as bf16 that is cut off: that halves the time of sorting on a GPU.
Levels of bf16 lie 2^-7 of a measure apart at most, and rows of one level rank by their place. So a rank errs by the
rows of its level at most, a small part of all where measures spread: no loss for a sum of two ranks.
"""

import torch

from vllm_l2kv.scorers import Rows, Scorer, keydiff, norms


class Bound(Scorer):
    """The rank of `keydiff` plus the rank of `||v||`, each 0 for the lowest of the rows held; an integer."""

    def score(self, rows: Rows) -> torch.Tensor:
        return _ranks(keydiff.unlikeness(rows.keys)) + _ranks(norms(rows.values))


def _ranks(measures: torch.Tensor) -> torch.Tensor:
    """`[num_heads, num_rows]` fp32 to ranks, 0 for the lowest.

    Of one level the first row ranks highest; NaN ranks lowest.
    """
    num_rows = measures.shape[-1]
    best_first = levels(measures).sort(dim=-1, descending=True, stable=True).indices
    descending = torch.arange(num_rows - 1, -1, -1, dtype=torch.float32, device=measures.device)
    return torch.empty_like(measures).scatter_(-1, best_first, descending.expand_as(measures))


def levels(measures: torch.Tensor) -> torch.Tensor:
    """fp32 cut off to bf16, toward zero; NaN is the lowest."""
    measures = measures.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return (measures.view(torch.int32) & -0x10000).view(torch.float32)
