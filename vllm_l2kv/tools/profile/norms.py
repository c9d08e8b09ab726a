"""Relates the norms of a layer's keys to the attention that the keys get, and to their directions.

Shapes: H KV heads, n tokens of a text before its last `NUM_QUERIES`, R keep ratios.
"""

import torch
from torch.nn.functional import cosine_similarity, normalize

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.scorers import norms
from vllm_l2kv.tools.profile.attention import (
    attention_loss,
    attention_loss_reference,
    rank_correlation,
    variation,
)
from vllm_l2kv.tools.profile.observe import Seen

NUM_QUERIES = 32
"""Queries after the prompt. A single one, as in the paper, would depend on its token more than on the head."""
KEEP_RATIOS = (0.75, 0.5, 0.25, 0.1)
JUDGED = KEEP_RATIOS.index(0.5)
LOW = 0.25
"""Share of the keys that count as keys of low norm."""
FIRST = CompressionParams.protect_first
"""Number of tokens that count as the first tokens; they do not count as keys of low norm."""
NUM_PEAKS = 3
"""Elements of a key that are zeroed."""


def measure(seen: Seen) -> dict[str, torch.Tensor]:
    """Measures one layer on one text: fp32 on the CPU, `[H]` unless another shape is given.

    Returns:
        variation: Standard deviation of the norms divided by their mean.
        correlation: Spearman's correlation of the negative norm and the attention received.
        alr: The paper's attention loss reference divided by n: the mean loss above the lowest possible one, in [0, 1].
        loss: `[R, H]`, share of attention lost by evicting the highest norms; random eviction loses 1 - ratio.
        ideal_loss: `[R, H]`, the lowest possible loss of any eviction.
        sink: Share of attention that the first token receives.
        sink_rank: Share of tokens with a lower norm than the first token.
        loss_beyond_first: `[R, H]`, as `loss`, without the first tokens.
        low_query: Cosine of the mean direction of keys of low norm and that of queries.
        all_query: Cosine of the mean direction of all keys and that of queries.
        low_first: Cosine of the mean direction of keys of low norm and that of the first tokens' keys.
        energy: `[head_size, H]`, the mean square of each element of keys of low norm.
        peaks_moved: Share of attention that moves to other tokens if the `NUM_PEAKS` elements with the most energy are
            set to zero in all keys.
        others_moved: The same for as many other elements, drawn at random.
        loss_without_peaks: As `loss` at half the tokens, with norms that ignore these elements.
    """
    keys = seen.keys[:, :-NUM_QUERIES].float()
    attention = _attention(seen)
    received, lengths = attention.sum(1), norms(keys)
    loss, ideal_loss = attention_loss(lengths, attention, KEEP_RATIOS)
    found = {
        "variation": variation(lengths),
        "correlation": rank_correlation(-lengths, received),
        "alr": attention_loss_reference(lengths, attention) / keys.shape[1],
        "loss": loss,
        "ideal_loss": ideal_loss,
        "sink": (received[:, 0] / received.sum(-1)).nan_to_num(),
        "sink_rank": (lengths < lengths[:, :1]).float().mean(-1),
        "loss_beyond_first": attention_loss(lengths[:, 1:], attention[..., 1:], KEEP_RATIOS)[0],
    }
    found |= _directions(seen, keys, lengths, attention)
    return {name: value.float().cpu() for name, value in found.items()}


def _directions(
    seen: Seen, keys: torch.Tensor, lengths: torch.Tensor, attention: torch.Tensor
) -> dict[str, torch.Tensor]:
    num_low = round(LOW * keys.shape[1])
    places = lengths[:, FIRST:].topk(num_low, largest=False).indices + FIRST
    low = keys.gather(1, places[..., None].expand(-1, -1, keys.shape[-1]))
    queries = seen.queries[:, -NUM_QUERIES:].float().reshape(len(keys), -1, keys.shape[-1])
    of_low, of_all, of_first, of_queries = (_direction(each) for each in (low, keys, keys[:, :FIRST], queries))
    energy = low.square().mean(1)
    peaks = energy.topk(NUM_PEAKS, -1).indices
    drawn = torch.rand(energy.shape, generator=torch.Generator().manual_seed(seen.layer)).to(energy.device)
    others = drawn.scatter(-1, peaks, -1.0).topk(NUM_PEAKS, -1).indices
    without = seen._replace(keys=_zeroed(seen.keys, peaks))
    lengths_without = norms(without.keys[:, :-NUM_QUERIES])
    return {
        "low_query": cosine_similarity(of_low, of_queries, -1),
        "all_query": cosine_similarity(of_all, of_queries, -1),
        "low_first": cosine_similarity(of_low, of_first, -1),
        "energy": energy.T,
        "peaks_moved": _moved(attention, _attention(without)),
        "others_moved": _moved(attention, _attention(seen._replace(keys=_zeroed(seen.keys, others)))),
        "loss_without_peaks": attention_loss(lengths_without, attention, KEEP_RATIOS[JUDGED : JUDGED + 1])[0][0],
    }


def _attention(seen: Seen) -> torch.Tensor:
    """Attention of the last `NUM_QUERIES` tokens to those before them, mean over query heads: `[H, NUM_QUERIES, n]`."""
    whole = torch.cat(list(seen.attention(seen.keys.shape[1] - NUM_QUERIES)), 2)
    return whole.mean(1)[..., :-NUM_QUERIES]


def _direction(rows: torch.Tensor) -> torch.Tensor:
    """The mean direction of rows `[H, m, head_size]`: `[H, head_size]`."""
    return normalize(rows, dim=-1).mean(1)


def _zeroed(keys: torch.Tensor, elements: torch.Tensor) -> torch.Tensor:
    """Keys `[H, T, head_size]` with the elements `[H, k]` of each head set to zero."""
    return keys.scatter(-1, elements[:, None].expand(-1, keys.shape[1], -1), 0.0)


def _moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Half of the summed absolute differences of two attentions `[H, NUM_QUERIES, n]`, mean over queries: `[H]`."""
    return (before - after).abs().sum(-1).mean(-1) / 2
