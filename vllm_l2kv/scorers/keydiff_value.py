"""Keeps rows with dissimilar keys and large values: the sum of two ranks.

Ranks have no unit, so neither measure outweighs the other in any head. Source: `keydiff`, and the norm of values, by
which Guo et al., "Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also
Matters", arXiv 2406.12335, weight attention. Adding their ranks is this project's idea.

Both measures are truncated to bf16 before they are ranked, which halves the time of sorting on a GPU. Adjacent bf16
values differ by at most 2^-7 of their size, and rows with equal values rank by their index. So a rank is wrong by at
most the number of rows with the same value, which is small if the measures vary.
"""

import torch

from vllm_l2kv.scorers import Rows, Scorer, keydiff, norms


class Bound(Scorer):
    """The rank of the `keydiff` score plus the rank of `||v||`, each 0 for the lowest row; an integer in fp32."""

    def score(self, rows: Rows) -> torch.Tensor:
        return _ranks(keydiff.unlikeness(rows.keys)) + _ranks(norms(rows.values))


def _ranks(measures: torch.Tensor) -> torch.Tensor:
    """`[num_heads, num_rows]` fp32 to ranks, 0 for the lowest.

    Of rows with equal values the first ranks highest; NaN ranks lowest.
    """
    num_rows = measures.shape[-1]
    best_first = levels(measures).sort(dim=-1, descending=True, stable=True).indices
    descending = torch.arange(num_rows - 1, -1, -1, dtype=torch.float32, device=measures.device)
    return torch.empty_like(measures).scatter_(-1, best_first, descending.expand_as(measures))


def levels(measures: torch.Tensor) -> torch.Tensor:
    """fp32 truncated to bf16, toward zero; NaN becomes the lowest value."""
    measures = measures.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return (measures.view(torch.int32) & -0x10000).view(torch.float32)
