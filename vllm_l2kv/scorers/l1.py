"""Keeps keys with low L1 norm: the sum of the absolute values of their elements.

Source: the L1 norm in place of the L2 norm of Devoto et al., arXiv 2406.11430, section 2.
"""

import torch

from vllm_l2kv.scorers import Rows, Scorer, norms


class Bound(Scorer):
    """`-||k||_1`."""

    def score(self, rows: Rows) -> torch.Tensor:
        return -norms(rows.keys, 1)
