"""Keeps keys that are least similar to the mean direction of all keys.

Source: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
Resource-Constrained Environments", arXiv 2504.15364, section 3, over the whole prompt at once.
"""

import torch
from torch.nn.functional import cosine_similarity, normalize

from vllm_l2kv.scorers import Rows, Scorer


class Bound(Scorer):
    """`-cos(k, mean of k / ||k||)`."""

    def score(self, rows: Rows) -> torch.Tensor:
        return unlikeness(rows.keys)


def unlikeness(keys: torch.Tensor) -> torch.Tensor:
    """Negative cosine of each key and the mean direction: `[num_heads, num_rows, size]` to `[num_heads, num_rows]`."""
    keys = keys.float()
    anchor = normalize(keys, dim=-1).mean(dim=-2, keepdim=True)
    return -cosine_similarity(keys, anchor, dim=-1)
