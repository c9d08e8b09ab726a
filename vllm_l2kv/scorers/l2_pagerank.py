"""Personalized PageRank on the graph of key similarities; walks start at, and restart from, keys with low L2 norm.

Source: `CentralityPress` of github.com/lapidoty/kvpress-centrality. It always keeps the first 4 and the last 8 tokens;
here `kv_protect_first` and `kv_protect_last` do that.
"""

import torch
from torch.nn.functional import normalize

from vllm_l2kv.scorers import Rows, Scorer, norms

DAMPING, NUM_ITERATIONS = 0.15, 3


class Bound(Scorer):
    """The PageRank of each token; edges have weight `(1 + cos) / 2`, and their matrix is never materialized."""

    def score(self, rows: Rows) -> torch.Tensor:
        directions = normalize(rows.keys.float(), dim=-1)
        teleport = (-norms(rows.keys)).softmax(dim=-1).unsqueeze(-1)
        walkers = teleport
        for _ in range(NUM_ITERATIONS):
            arrived = (walkers.sum(dim=-2, keepdim=True) + directions @ (directions.mT @ walkers)) / 2
            walkers = DAMPING * arrived / arrived.sum(dim=-2, keepdim=True) + (1 - DAMPING) * teleport
        return walkers.squeeze(-1)
