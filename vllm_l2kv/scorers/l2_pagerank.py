"""PageRank on the similarity of keys that starts from, and keeps returning to, keys of low norm.

Source: `CentralityPress` of github.com/lapidoty/kvpress-centrality, without the tokens that it protects: protect them
with `kv_protect_first` and `kv_protect_last` (4 and 8 there).
"""

import torch
from torch.nn.functional import normalize

from vllm_l2kv.scorers import Rows, Scorer, norms

DAMPING, NUM_ITERATIONS = 0.15, 3


class Bound(Scorer):
    """The share of walkers at each token; edges weigh `(1 + cos) / 2`, never written out."""

    def score(self, rows: Rows) -> torch.Tensor:
        directions = normalize(rows.keys.float(), dim=-1)
        teleport = (-norms(rows.keys)).softmax(dim=-1).unsqueeze(-1)
        walkers = teleport
        for _ in range(NUM_ITERATIONS):
            arrived = (walkers.sum(dim=-2, keepdim=True) + directions @ (directions.mT @ walkers)) / 2
            walkers = DAMPING * arrived / arrived.sum(dim=-2, keepdim=True) + (1 - DAMPING) * teleport
        return walkers.squeeze(-1)
