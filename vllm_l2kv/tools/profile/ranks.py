"""What layers and KV heads do for answers: where answers look, what a repetition needs, what a loss of rows costs.

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
"""Share of all rows that the pooled budget of a repetition keeps."""
FLOOR = 0.2
"""Share of an equal part of it that every head gets at least."""
CUTS_AT_ONCE = 64


class Rows(NamedTuple):
    """A text in the cache of one layer, and what a repetition of the text looks at.

    Attributes:
        layer: Its index.
        keys: `[H, T, head_size]` after RoPE, in the model's type.
        values: The same.
        scores: `[H, T]` fp32, the most attention that any token of the repetition and any query head pays a row.
    """

    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor


class Answers(NamedTuple):
    """What one question says; fp32 on the CPU, NaN in layers that never compress.

    Attributes:
        retrieval: `[L, H]`, attention from the answer to the fact it needs.
        loss: `[L]`, by how many nats a token the answer loses when a layer keeps protected rows alone.
        head_loss: `[L, H]`, the same when a KV head does.
        whole_loss: Nats a token with all rows.
        answered: Whether the model, with all rows, would say the answer.
    """

    retrieval: torch.Tensor
    loss: torch.Tensor
    head_loss: torch.Tensor
    whole_loss: float
    answered: bool


def repetition(model: Any, token_ids: Sequence[int], between: Sequence[int], also: Watch | None = None) -> list[Rows]:
    """Reads a text and its repetition: the rows of the text in each layer of full attention, in order.

    Args:
        model: Of `transformers`.
        token_ids: T tokens.
        between: Those of `REPEAT`.
        also: Shown what each of these layers got of the text itself.

    Raises:
        ValueError: A model of another layout.
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
    """Shares of its rows that each head keeps of a budget that all share, by what a repetition looks at.

    Args:
        scores: `[L, H, T]` of `Rows`.

    Returns:
        `[L, H]` fp32; their mean is `POOLED`, rounded up to whole rows of a head.
    """
    num_layers, num_heads, num_tokens = scores.shape
    num_keep = math.ceil(POOLED * num_tokens)
    best = scores.sort(stable=True, dim=-1, descending=True)
    # Each head's own best come first.
    ordered = best.values.clone()
    ordered[..., : int(FLOOR * num_keep)] = torch.inf
    chosen = ordered.flatten().sort(stable=True, dim=0, descending=True).indices[: num_keep * num_layers * num_heads]
    counts = torch.bincount(chosen // num_tokens, minlength=num_layers * num_heads)
    return counts.view(num_layers, num_heads).float() / num_tokens


def answers(model: Any, shape: Shape, context: Context, asked: Question) -> Answers:
    """Answers one question about a text by its rows: all of them, and all but those of one layer or head.

    Args:
        model: Of `transformers`.
        shape: Of its cache.
        context: The text's rows.
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
    """For each layer that may compress, without it and without each of its heads: `[C, L, H, T]`, a part at a time."""
    cuts = [(layer, head) for layer in shape.compressible for head in (slice(None), *range(shape.num_kv_heads))]
    first, last = CompressionParams.protect_first, num_tokens - CompressionParams.protect_last
    for begin in range(0, len(cuts), CUTS_AT_ONCE):
        some = cuts[begin : begin + CUTS_AT_ONCE]
        keep = torch.ones(len(some), shape.num_layers, shape.num_kv_heads, num_tokens, dtype=torch.bool)
        for choice, (layer, head) in enumerate(some):
            keep[choice, layer, head, first:last] = False
        yield keep
