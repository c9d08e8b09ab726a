"""Scorers without kernels: torch scores one head at a time, and allocates memory of its own.

This takes many launches and copies of the keys, which would delay requests, so it serves comparisons only.
"""

import torch

from vllm_l2kv.kernels.batch import Batch
from vllm_l2kv.kernels.finish import finish
from vllm_l2kv.kernels.reference import LayerRows, read
from vllm_l2kv.scorers import Scorer


class Kernels:
    """Calls `Scorer.score`."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def write(self, batch: Batch, out: torch.Tensor, work: torch.Tensor, raw: bool) -> None:
        """See `scores.Scored`."""
        cache, of_layers = batch.cache, self._scorer.heads.of_layers
        places = [(layer, head) for layer, heads in enumerate(of_layers) for head in range(len(heads))]
        for row in batch.rows:
            blocks = batch.table[row.source : row.destination].long()
            first = row.first_score * cache.num_selections
            scores = out[first:][: cache.num_selections * row.num_rows].view(torch.float32)
            for of_head, view, (layer, head) in zip(scores.view(-1, row.num_rows), cache.heads, places, strict=True):
                keys, values = view.unsqueeze(1).tensor_split([cache.head_size], dim=-1)
                rows = LayerRows(keys, values, cache.key_dtype)
                keys, values = read(keys, blocks, row.num_rows), read(values, blocks, row.num_rows)
                of_head.copy_(self._scorer.score(rows.seen(keys, values, layer, head))[0])
        if not raw:
            finish(batch, out, "token")
