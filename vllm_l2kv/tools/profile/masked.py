"""What answers lose when layers and KV heads keep only some rows of a context, on a model of `transformers`.

Evicting a row and masking it are the same thing: rows keep their positions. So a context is read once, and many choices
of rows are tried beside each other, as a batch that shares the rows of the context.

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
        keys: Of each layer with keys, `[H, t, head_size]`; one with a sliding window holds the t last tokens alone.
        values: The same.
        states: Of each recurrent layer, as `transformers` caches it.
        num_tokens: Tokens T that were read.
    """

    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    states: dict[int, Any]
    num_tokens: int


class Losses(NamedTuple):
    """Of each choice of rows.

    Attributes:
        loss: `[C]` fp32 on the CPU, nats a token: the mean over the tokens of the answer.
        exact: `[C]` bool on the CPU, whether greedy decoding would say the answer.
    """

    loss: torch.Tensor
    exact: torch.Tensor

    @property
    def cost(self) -> torch.Tensor:
        """`[C]`, from 0 to 1: half of it for an answer that is not exact, half for the likelihood that a token lost.

        By losses alone a setting could lose some answers altogether as long as it does well on the others, and whether
        answers are exact says nothing of how nearly.
        """
        return ((~self.exact).float() + 1 - (-self.loss).exp()) / 2


@dataclass
class _Masked:
    """What one pass over a batch of choices needs in each layer.

    Attributes:
        context: What was read before.
        keep: `[C, L, H, T]` bool.
        watch: Shown what each layer looks at, if there is one.
        layers: Layers that have looked at it.
    """

    context: Context
    keep: torch.Tensor
    watch: Watch | None
    layers: set[int] = field(default_factory=set)


@torch.inference_mode()
def read(model: Any, token_ids: Sequence[int]) -> Context:
    """Reads a context from its first token on, with the attention that the model was loaded with."""
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
    """Goes on reading after a context of which each choice keeps other rows, and says what the last tokens lose.

    Args:
        model: A causal language model of `transformers`.
        context: Of it.
        token_ids: What comes after the context: a question and its answer, or an answer alone.
        num_predicted: Tokens at its end that are the answer. The first token after a context is predicted by the
            context's last one, which has seen everything, so it cannot be one of them.
        keep: `[C, L, H, T]` bool, rows of the context that are seen. Layers with a sliding window see all of theirs.
        watch: Shown for each layer of full attention its index and `[c, H, G, n, T + n]` fp32, the attention of the n
            new tokens under some of the choices, G query heads for each KV head.

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
    """Arguments with which recurrent layers go on after a context, the same for each choice of rows."""
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
