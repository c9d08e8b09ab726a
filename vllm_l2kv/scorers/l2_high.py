"""Keeps keys with high L2 norm: a control, the opposite of `l2`.

Source: "keep high norm" in Devoto et al., arXiv 2406.11430, section 3.
"""

import torch

from vllm_l2kv.scorers import Rows, Scorer, norms


class Bound(Scorer):
    """`||k||`."""

    def score(self, rows: Rows) -> torch.Tensor:
        return norms(rows.keys)
