"""Low key norms: keys of low norm tend to attract attention later.

Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430,
section 2.
"""

import torch

from vllm_l2kv.scorers import Rows, Scorer, norms


class Bound(Scorer):
    """`-||k||`."""

    def score(self, rows: Rows) -> torch.Tensor:
        return -norms(rows.keys)
