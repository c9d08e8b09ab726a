"""Importance of layers and KV heads: attention of answers, attention of a repetition, and losses without their rows.

Shapes: L layers, H KV heads, G query heads for each, T tokens of a text, n tokens of an answer.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.profile import Shape
from vllm_l2kv.tools.profile.calibration import Question
from vllm_l2kv.tools.profile.masked import Context, answer_losses
from vllm_l2kv.tools.profile.observe import Seen, Watch, read

REPEAT = "\n\nRepeat the previous context exactly.\n\n"
"""Between a text and its repetition, as in KVzip (Kim et al., arXiv 2505.23416)."""
POOLED = 0.1
"""Share of all rows that the budget shared by all heads keeps."""
FLOOR = 0.2
"""Least rows of a head, as a share of an equal part of that budget."""
CUTS_AT_ONCE = 64


class Rows(NamedTuple):
    """The rows of a text in one layer, and the attention that they get from a repetition of the text.

    Attributes:
        layer: Index of the layer.
        keys: `[H, T, head_size]` after RoPE, in the model's type.
        values: Same form.
        scores: `[H, T]` fp32, largest attention to each row over all tokens of the repetition and all query heads.
    """

    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor


class Answers(NamedTuple):
    """Measurements with one question; fp32 on the CPU, NaN in layers that never compress.

    Attributes:
        retrieval: `[L, H]`, attention from the answer to the fact that it needs.
        loss: `[L]`, nats per token that the answer loses if a layer keeps only the protected rows.
        head_loss: `[L, H]`, the same for a KV head.
        whole_loss: Loss with all rows, in nats per token.
        answered: Whether the model gives the answer with all rows.
    """

    retrieval: torch.Tensor
    loss: torch.Tensor
    head_loss: torch.Tensor
    whole_loss: float
    answered: bool


def repetition(model: Any, token_ids: Sequence[int], between: Sequence[int], also: Watch | None = None) -> list[Rows]:
    """Reads a text and its repetition, and returns the rows of the text in each layer of full attention, in order.

    Args:
        model: Model of `transformers`.
        token_ids: Token ids of the text.
        between: Token ids of `REPEAT`.
        also: Called with the attention inputs of each of these layers for the text alone.

    Raises:
        ValueError: The layout of the model is not supported.
    """
    found: list[Rows] = []
    num_tokens = len(token_ids)

    def look(seen: Seen) -> None:
        if seen.window is not None:
            return
        scores = seen.keys.new_zeros(seen.keys.shape[0], num_tokens, dtype=torch.float32)
        for attention in seen.attention(num_tokens + len(between)):
            torch.maximum(scores, attention[..., :num_tokens].amax(dim=(1, 2)), out=scores)
        text = seen.until(num_tokens)
        found.append(Rows(seen.layer, text.keys, text.values, scores))
        if also is not None:
            also(text)

    read(model, [*token_ids, *between, *token_ids], look)
    return found


def pooled_shares(scores: torch.Tensor) -> torch.Tensor:
    """Share of its rows that each head keeps if all heads share a budget, and rows with the highest scores are kept.

    Args:
        scores: `[L, H, T]`, see `Rows`.

    Returns:
        `[L, H]` fp32; the mean is `POOLED`, rounded up to whole rows of a head.
    """
    num_layers, num_heads, num_tokens = scores.shape
    num_keep = math.ceil(POOLED * num_tokens)
    best = scores.sort(stable=True, dim=-1, descending=True)
    # The best rows of each head come first.
    ordered = best.values.clone()
    ordered[..., : int(FLOOR * num_keep)] = torch.inf
    chosen = ordered.flatten().sort(stable=True, dim=0, descending=True).indices[: num_keep * num_layers * num_heads]
    counts = torch.bincount(chosen // num_tokens, minlength=num_layers * num_heads)
    return counts.view(num_layers, num_heads).float() / num_tokens


def answers(model: Any, shape: Shape, context: Context, asked: Question) -> Answers:
    """Measures the answer to a question with all rows of a text, and without those of each layer or head.

    Args:
        model: Model of `transformers`.
        shape: Shape of the model's KV cache.
        context: Rows of the text.
        asked: The question.
    """
    size = shape.num_layers, shape.num_kv_heads
    retrieval = torch.full(size, torch.nan)
    token_ids, num_predicted = [*asked.question, *asked.answer], len(asked.answer)

    def look(layer: int, attention: torch.Tensor) -> None:
        to_fact = attention[0, :, :, -num_predicted:, slice(*asked.span)].sum(-1)
        retrieval[layer] = to_fact.amax(1).mean(-1).cpu()

    everything = torch.ones(1, *size, context.num_tokens, dtype=torch.bool)
    whole = answer_losses(model, context, token_ids, num_predicted, everything, look)
    losses = torch.cat(
        [answer_losses(model, context, token_ids, num_predicted, cut).loss for cut in _cuts(shape, context.num_tokens)]
    )
    lost = torch.full((shape.num_layers, 1 + shape.num_kv_heads), torch.nan)
    lost[list(shape.compressible)] = (losses - whole.loss).view(-1, 1 + shape.num_kv_heads)
    return Answers(retrieval, lost[:, 0], lost[:, 1:], whole.loss.item(), bool(whole.exact))


def _cuts(shape: Shape, num_tokens: int) -> Iterator[torch.Tensor]:
    """Masks without the rows of each layer, and of each of its heads: `[C, L, H, T]` bool per compressible layer."""
    cuts = [(layer, head) for layer in shape.compressible for head in (slice(None), *range(shape.num_kv_heads))]
    first, last = CompressionParams.protect_first, num_tokens - CompressionParams.protect_last
    for begin in range(0, len(cuts), CUTS_AT_ONCE):
        some = cuts[begin : begin + CUTS_AT_ONCE]
        keep = torch.ones(len(some), shape.num_layers, shape.num_kv_heads, num_tokens, dtype=torch.bool)
        for choice, (layer, head) in enumerate(some):
            keep[choice, layer, head, first:last] = False
        yield keep
