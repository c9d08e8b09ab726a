"""Keeps rows with large values and small keys.

Source: Chitty-Venkata et al., "PagedEviction: Structured Block-wise KV Cache Pruning for Efficient Large Language Model
Inference", arXiv 2509.04377, section 3, for each head separately instead of the mean over heads and layers.
"""

import torch

from vllm_l2kv.scorers import Rows, Scorer, norms


class Bound(Scorer):
    """`||v|| / ||k||`."""

    def score(self, rows: Rows) -> torch.Tensor:
        return norms(rows.values) / norms(rows.keys)
