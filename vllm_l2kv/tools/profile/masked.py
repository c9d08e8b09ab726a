"""What answers lose when layers and KV heads keep only some rows of a context, on a model of `transformers`.

Evicting a row and masking it are the same thing: rows keep their positions. So a context is read once, and many choices
of rows are tried beside each other, as a batch that shares the rows of the context.

Shapes: L layers, H KV heads of them, T tokens of a context, C choices of rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

NAME = "l2kv_masked"
"""Of the attention, where `transformers` looks it up."""
UNKNOWN = "{} has an attention of an unknown layout: its rows cannot be hidden from answers."
MAX_SCORES = 1 << 26
"""Attention scores or logits that are held at once: some hundred MB in fp32."""


class Context(NamedTuple):
    """The rows of a context, as the model caches them.

    Attributes:
        keys: Of each layer, `[H, t, head_size]`; a layer with a sliding window holds the t last tokens alone.
        values: The same.
        num_tokens: Tokens T that were read.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    num_tokens: int


class Losses(NamedTuple):
    """Of each choice of rows.

    Attributes:
        loss: `[C]` fp32 on the CPU, nats a token: the mean over the tokens of the answer.
        exact: `[C]` bool on the CPU, whether greedy decoding would say the answer.
    """

    loss: torch.Tensor
    exact: torch.Tensor


@dataclass
class _Masked:
    """What one pass over a batch of choices needs in each layer.

    Attributes:
        context: What was read before.
        keep: `[C, L, H, T]` bool.
        layers: Layers that have looked at it.
    """

    context: Context
    keep: torch.Tensor
    layers: set[int]


@torch.inference_mode()
def read(model: Any, token_ids: Sequence[int]) -> Context:
    """Reads a context from its first token on, with the attention that the model was loaded with."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.tensor([token_ids], device=model.device)
    model.get_decoder()(ids, past_key_values=cache, use_cache=True)
    keys, values = [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers]
    return Context(keys, values, len(token_ids))


@torch.inference_mode()
def answer_losses(
    model: Any, context: Context, token_ids: Sequence[int], num_predicted: int, keep: torch.Tensor
) -> Losses:
    """Goes on reading after a context of which each choice keeps other rows, and says what the last tokens lose.

    Args:
        model: A causal language model of `transformers`.
        context: Of it.
        token_ids: What comes after the context: a question and its answer, or an answer alone.
        num_predicted: Tokens at its end that are the answer. The first token after a context is predicted by the
            context's last one, which has seen everything, so it cannot be one of them.
        keep: `[C, L, H, T]` bool, rows of the context that are seen. Layers with a sliding window see all of theirs.

    Raises:
        ValueError: Nothing or too much is predicted, or the model has a layout that rows cannot be hidden from.
    """
    if not 0 < num_predicted < len(token_ids):
        raise ValueError(f"num_predicted must be in 1..{len(token_ids) - 1}, got {num_predicted}.")
    config = model.config.get_text_config()
    scores = config.num_attention_heads * (len(token_ids) - 1) * (context.num_tokens + len(token_ids))
    at_once = max(1, MAX_SCORES // max(scores, num_predicted * config.vocab_size))
    device, last = model.device, context.num_tokens + len(token_ids) - 1
    ids = torch.tensor([token_ids[:-1]], device=device)
    positions = torch.arange(context.num_tokens, last, device=device)[None]
    targets = torch.tensor(token_ids[-num_predicted:], device=device)
    losses, exact = [], []
    with _attention(model):
        for first in range(0, len(keep), at_once):
            some = keep[first : first + at_once]
            masked = _Masked(context, some.to(device), set())
            logits = model(
                ids.expand(len(some), -1),
                position_ids=positions.expand(len(some), -1),
                use_cache=False,
                logits_to_keep=num_predicted,
                masked=masked,
            ).logits.float()
            if len(masked.layers) != len(context.keys):
                raise ValueError(UNKNOWN.format(type(model).__name__))
            every = targets.expand(len(some), -1)
            losses.append(cross_entropy(logits.transpose(1, 2), every, reduction="none").mean(-1).cpu())
            exact.append((logits.argmax(-1) == every).all(-1).cpu())
    return Losses(torch.cat(losses), torch.cat(exact))


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    """While it is open the model attends as `_attend` does."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    masked: _Masked | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    # [C, num_heads, n, head_size] of n new tokens, which see kept rows of the context and, causally, each other.
    if masked is None or s_aux is not None:
        raise ValueError(UNKNOWN.format(type(module).__name__))
    masked.layers.add(module.layer_idx)
    past_keys, past_values = (rows[module.layer_idx] for rows in (masked.context.keys, masked.context.values))
    n, num_past = query.shape[2], past_keys.shape[1]
    query = query.reshape(len(query), key.shape[1], -1, *query.shape[2:])
    past = torch.einsum("chgnd,htd->chgnt", query, past_keys)
    new = torch.einsum("chgnd,chmd->chgnm", query, key)
    scores = torch.cat((past, new), -1).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # How far back of each new token a row is.
    distance = torch.arange(n, device=query.device)[:, None] - torch.arange(-num_past, n, device=query.device)
    seen = distance >= 0
    if sliding_window is not None:
        seen &= distance < sliding_window
    scores.masked_fill_(~seen, -torch.inf)
    if sliding_window is None:
        kept = masked.keep[:, module.layer_idx, :, None, None]
        scores[..., :num_past].masked_fill_(~kept, -torch.inf)
    weights = scores.softmax(-1).to(value.dtype)
    attended = torch.einsum("chgnt,htd->chgnd", weights[..., :num_past], past_values)
    attended += torch.einsum("chgnm,chmd->chgnd", weights[..., num_past:], value)
    return attended.flatten(1, 2).transpose(1, 2).contiguous(), None
