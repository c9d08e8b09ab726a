"""Keeps the first four tokens and the last ones: a control that does not use keys.

Source: StreamingLLM, Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453,
but rotary positions are not changed.
"""

import torch

from vllm_l2kv.scorers import Rows, Scorer

NUM_SINKS = 4


class Bound(Scorer):
    """The row's index; for the sinks (the first four rows), more than any index."""

    def score(self, rows: Rows) -> torch.Tensor:
        num_rows, num_tokens = rows.keys.shape[:2]
        scores = torch.arange(num_tokens, dtype=torch.float32, device=rows.keys.device)
        scores[:NUM_SINKS] = num_tokens
        return scores.expand(num_rows, -1)
