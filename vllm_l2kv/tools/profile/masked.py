"""Losses of answers when layers and KV heads keep only some rows of a context, in a model of `transformers`.

Masking a row is equivalent to evicting it, since rows keep their positions. So a context is read once, and many choices
of rows are tried at the same time, as a batch that shares the rows of the context.

Shapes: L layers, H KV heads of them, T tokens of a context, C choices of rows.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from vllm_l2kv.tools.profile.observe import MAX_SCORES, UNKNOWN, attending, visible_scores

Watch = Callable[[int, torch.Tensor], None]


class Context(NamedTuple):
    """The rows of a context, as the model caches them.

    Attributes:
        keys: For each attention layer, `[H, t, head_size]`; t < T in layers with a sliding window, the last tokens.
        values: Same form.
        states: For each recurrent layer, its state in the form of `transformers`.
        num_tokens: Tokens T that were read.
    """

    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    states: dict[int, Any]
    num_tokens: int


class Losses(NamedTuple):
    """Losses of an answer under each choice of rows.

    Attributes:
        loss: `[C]` fp32 on the CPU, mean over the answer's tokens in nats per token.
        exact: `[C]` bool on the CPU, whether greedy decoding would give the answer.
    """

    loss: torch.Tensor
    exact: torch.Tensor

    @property
    def cost(self) -> torch.Tensor:
        """`[C]`, from 0 to 1: one half if the answer is not exact, plus half of the likelihood that a token lost.

        By loss alone, a setting could fail on some answers and make up for it on others. Exactness alone does not tell
        how close an answer is.
        """
        return ((~self.exact).float() + 1 - (-self.loss).exp()) / 2


@dataclass
class _Masked:
    """State of a forward pass over a batch of choices.

    Attributes:
        context: The context, which was read before.
        keep: `[C, L, H, T]` bool, kept rows.
        watch: Called with the attention of each layer; `None` for no calls.
        layers: Indices of the layers that have used this state.
    """

    context: Context
    keep: torch.Tensor
    watch: Watch | None
    layers: set[int] = field(default_factory=set)


@torch.inference_mode()
def read(model: Any, token_ids: Sequence[int]) -> Context:
    """Reads a context, with the attention implementation with which the model was loaded."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.tensor([token_ids], device=model.device)
    model.get_decoder()(ids, past_key_values=cache, use_cache=True)
    layers = dict(enumerate(cache.layers))
    with_keys = {i: layer for i, layer in layers.items() if hasattr(layer, "keys")}
    return Context(
        {i: layer.keys[0] for i, layer in with_keys.items()},
        {i: layer.values[0] for i, layer in with_keys.items()},
        {i: layer for i, layer in layers.items() if any(getattr(layer, "has_previous_state", {}).values())},
        len(token_ids),
    )


@torch.inference_mode()
def answer_losses(
    model: Any,
    context: Context,
    token_ids: Sequence[int],
    num_predicted: int,
    keep: torch.Tensor,
    watch: Watch | None = None,
) -> Losses:
    """Losses of an answer after a context of which each choice keeps other rows.

    Args:
        model: A causal language model of `transformers`.
        context: A context that this model has read.
        token_ids: Token ids after the context: a question and its answer, or an answer alone.
        num_predicted: Number of last tokens that are the answer. It cannot include the first token after the context,
            which the context's last token predicts from all rows.
        keep: `[C, L, H, T]` bool, kept rows of the context. Layers with a sliding window keep all their rows.
        watch: Called for each layer of full attention with its index and `[c, H, G, n, T + n]` fp32: the attention of
            the n new tokens under some of the choices, for G query heads per KV head.

    Raises:
        ValueError: `num_predicted` is out of bounds, or rows cannot be masked in this model.
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
    with attending(model, _attend):
        for first in range(0, len(keep), at_once):
            some = keep[first : first + at_once]
            masked = _Masked(context, some.to(device), watch)
            logits = model(
                ids.expand(len(some), -1),
                position_ids=positions.expand(len(some), -1),
                logits_to_keep=num_predicted,
                masked=masked,
                **_states_of(model, context, len(some)),
            ).logits.float()
            if len(masked.layers) != len(context.keys):
                raise ValueError(UNKNOWN.format(type(model).__name__))
            every = targets.expand(len(some), -1)
            losses.append(cross_entropy(logits.transpose(1, 2), every, reduction="none").mean(-1).cpu())
            exact.append((logits.argmax(-1) == every).all(-1).cpu())
    return Losses(torch.cat(losses), torch.cat(exact))


def _states_of(model: Any, context: Context, num_choices: int) -> dict[str, Any]:
    """Arguments for recurrent layers to continue after a context, the same for each choice of rows."""
    if not context.states:
        return {"use_cache": False}
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for i, state in context.states.items():
        cache.layers[i] = deepcopy(state)
        cache.layers[i].reorder_cache(torch.zeros(num_choices, dtype=torch.long))
    return {"use_cache": True, "past_key_values": cache}


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
    # `query` is [C, num_heads, n, head_size]; the n new tokens see kept rows of the context and, causally, each other.
    if masked is None or s_aux is not None:
        raise ValueError(UNKNOWN.format(type(module).__name__))
    masked.layers.add(module.layer_idx)
    past_keys, past_values = (rows[module.layer_idx] for rows in (masked.context.keys, masked.context.values))
    n, num_past = query.shape[2], past_keys.shape[1]
    query = query.reshape(len(query), key.shape[1], -1, *query.shape[2:])
    past = torch.einsum("chgnd,htd->chgnt", query, past_keys)
    new = torch.einsum("chgnd,chmd->chgnm", query, key)
    scores = torch.cat((past, new), -1).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    distance = torch.arange(n, device=query.device)[:, None] - torch.arange(-num_past, n, device=query.device)
    scores = visible_scores(scores, distance, softcap, sliding_window)
    if sliding_window is None:
        kept = masked.keep[:, module.layer_idx, :, None, None].to(scores.device)
        scores[..., :num_past].masked_fill_(~kept, -torch.inf)
    weights = scores.softmax(-1)
    if masked.watch is not None and sliding_window is None:
        masked.watch(module.layer_idx, weights)
    weights = weights.to(value.dtype)
    attended = torch.einsum("chgnt,htd->chgnd", weights[..., :num_past], past_values)
    attended += torch.einsum("chgnm,chmd->chgnd", weights[..., num_past:], value)
    return attended.flatten(1, 2).transpose(1, 2).contiguous(), None
