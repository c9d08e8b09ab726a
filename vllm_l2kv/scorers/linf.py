"""Keeps keys with low L-infinity norm: the largest absolute value of their elements.

Source: the maximum norm in place of the L2 norm of Devoto et al., arXiv 2406.11430, section 2.
"""

import math

import torch

from vllm_l2kv.scorers import Rows, Scorer, norms


class Bound(Scorer):
    """`-||k||_inf`."""

    def score(self, rows: Rows) -> torch.Tensor:
        return -norms(rows.keys, math.inf)
