"""Keeps keys with low L2 norm, which tend to get high attention later.

Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430,
section 2.
"""

import torch

from vllm_l2kv.scorers import Rows, Scorer, norms


class Bound(Scorer):
    """`-||k||`."""

    def score(self, rows: Rows) -> torch.Tensor:
        return -norms(rows.keys)
