"""The reference with other scorers, and answers that are the same on every machine."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from reference import Reference

from vllm_l2kv.params import OFFERED_SCORERS
from vllm_l2kv.scorers import Heads, Rows, Weights, bind

TELLING_SCORES, TELLING_LOGITS = 5e-6, 1e-4
"""Minimum distances between kept and evicted rows, relative to a score, and between the two most likely logits.

Engine and reference sum in different orders; after thousands of tokens that makes a few 1e-7 and 1e-5.
"""


TELLING_SCORERS = tuple(name for name in OFFERED_SCORERS if name not in ("keydiff_value", "learned"))
"""Scorers of any engine whose scores show that rounding decides nothing; ranks have no such distances."""


class ScoredReference(Reference):
    """Keeps the rows that `scorer` chooses; `tests/kernels/test_scorers.py` tests scorers.

    Attributes:
        scorer: A value of `kv_scorer`.
        num_full_layers: Number of layers before the first compressed one.
        weights: Weights of the scorer `learned`; `None` without it.
        full_heads: The full heads, as in `Reference`.
    """

    scorer = "l2"

    def __init__(self, model: Path, num_full_layers: int, weights: Weights | None = None, **options: Any) -> None:
        super().__init__(model, **options)
        self.num_full_layers = num_full_layers
        self._closest_scores = math.inf
        config = self.model.config
        layers, num_heads = range(config.num_hidden_layers), config.num_key_value_heads
        self._scorers = bind(Heads.of_rank(layers, num_heads, 0, 1, torch.device(self.device)), weights)

    def telling_answer(
        self, prompt: Sequence[int], num_tokens: int, scorer: str = "l2", **rule: Any
    ) -> list[int] | None:
        """Returns greedy tokens; `None` if rounding would decide one of them, or which rows are kept."""
        self.scorer, self._closest_scores = scorer, math.inf
        logits = self.logits(prompt, [None] * num_tokens, full_layers=range(self.num_full_layers), **rule)
        best, second = logits.topk(2).values.unbind(-1)
        is_telling = (best - second).min() > TELLING_LOGITS and self._closest_scores > TELLING_SCORES
        return logits.argmax(-1).tolist() if is_telling else None

    def _kept(self, index, keys, values, num_keep, first, last):
        num_rows = keys.shape[1]
        scorer, full = self._scorers[self.scorer], self.full_heads.get(index, ())
        heads = [head for head in range(len(keys) + len(full)) if head not in full]
        of_heads = zip(keys.unsqueeze(1), values.unsqueeze(1), heads, strict=True)
        scores = torch.cat([scorer.score(Rows(key, value, index, head)) for key, value, head in of_heads])
        scores[:, :first] = scores[:, num_rows - last :] = torch.inf
        ordered, rows = scores.sort(descending=True, stable=True)
        last_kept, first_evicted = ordered[:, num_keep - 1], ordered[:, num_keep]
        closest = ((last_kept - first_evicted) / first_evicted.abs()).min()
        self._closest_scores = min(self._closest_scores, float(closest))
        return rows[:, :num_keep].sort().values[None]
