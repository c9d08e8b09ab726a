"""Keeps tokens that differ most from the tokens after them.

The prompt after the sinks is divided into partitions. A token's key and value are normalized by the range of the next
partition; tokens whose channels then have a high standard deviation rank high in their partition. The sinks, the last
whole partition and the tokens after it are kept first.

Source: Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
arXiv 2504.04704, section 3, with ranks that are comparable between partitions.
"""

import torch

from vllm_l2kv.scorers import Rows, Scorer

NUM_SINKS, LAG = 4, 128


class Bound(Scorer):
    """Rank in the partition, in [0, 1); 1 for tokens kept first. In short prompts, later tokens rank higher."""

    def score(self, rows: Rows) -> torch.Tensor:
        num_rows, num_tokens = rows.keys.shape[:2]
        num_partitions = (num_tokens - NUM_SINKS) // LAG
        scores = torch.ones(num_rows, num_tokens, device=rows.keys.device)
        if num_partitions < 2:
            rest = max(num_tokens - NUM_SINKS, 0)
            scores[:, NUM_SINKS:] = torch.arange(rest, device=scores.device) / max(rest, 1)
            return scores
        spread = (_spread(rows.keys, num_partitions) + _spread(rows.values, num_partitions)) / 2
        ranks = spread.sort(dim=-1, stable=True).indices.argsort(dim=-1) / LAG
        scores[:, NUM_SINKS : NUM_SINKS + ranks[0].numel()] = ranks.flatten(1)
        return scores


def _spread(rows: torch.Tensor, num_partitions: int) -> torch.Tensor:
    """`[num_rows, num_tokens, size]` to `[num_rows, num_partitions - 1, LAG]`, which sums to 1 over each partition."""
    end = NUM_SINKS + num_partitions * LAG
    partitions = rows[:, NUM_SINKS:end].float().reshape(rows.shape[0], num_partitions, LAG, -1)
    own, following = partitions[:, :-1], partitions[:, 1:]
    low, high = following.amin(dim=-2, keepdim=True), following.amax(dim=-2, keepdim=True)
    spread: torch.Tensor = ((own - low) / (high - low)).std(dim=-1).softmax(dim=-1)
    return spread
