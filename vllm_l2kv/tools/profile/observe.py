"""Observes a model of `transformers` while it reads: queries, keys and values that the attention of each layer gets.

Shapes: H KV heads, G query heads for each of them, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_l2kv.profile import RECURRENT, WITHOUT_CACHE

NAME = "l2kv_attention"
"""Name under which `transformers` looks up an attention function of this package."""
UNKNOWN = "{} has attention of an unknown layout, so it cannot be profiled."
MAX_SCORES = 1 << 26
"""Attention scores in memory at once: some hundred MB in fp32."""

Watch = Callable[["Seen"], None]


class Seen(NamedTuple):
    """The inputs of one layer's attention, in the model's type.

    Attributes:
        layer: Index of the layer.
        queries: `[H * G, T, head_size]` after RoPE.
        keys: `[H, T, head_size]` as in the cache.
        values: `[H, T, head_size]`.
        scale: Factor of dot products.
        softcap: Cap on scaled dot products, as in Gemma 2; `None` for none.
        window: Number of last tokens that a query sees, itself included; `None` for all.
    """

    layer: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float
    softcap: float | None
    window: int | None

    def until(self, num_tokens: int) -> "Seen":
        """The same inputs for the first `num_tokens` tokens only."""
        return self._replace(
            queries=self.queries[:, :num_tokens], keys=self.keys[:, :num_tokens], values=self.values[:, :num_tokens]
        )

    def attention(self, first: int) -> Iterator[torch.Tensor]:
        """Attention of the tokens from `first` on, in order, in parts.

        Yields:
            `[H, G, n, T]` fp32 for the next n tokens; rows sum to 1.
        """
        num_heads, num_tokens, head_size = self.keys.shape
        keys = self.keys.float().transpose(1, 2)
        at_once = max(1, MAX_SCORES // (len(self.queries) * num_tokens))
        places = torch.arange(num_tokens, device=keys.device)
        for begin in range(first, num_tokens, at_once):
            some = self.queries[:, begin : begin + at_once].float().reshape(num_heads, -1, head_size)
            scores = (some @ keys * self.scale).view(num_heads, len(self.queries) // num_heads, -1, num_tokens)
            distance = places[begin : begin + at_once, None] - places
            yield visible_scores(scores, distance, self.softcap, self.window).softmax(-1)


def visible_scores(
    scores: torch.Tensor, distance: torch.Tensor, softcap: float | None, window: int | None
) -> torch.Tensor:
    """Attention scores with softcap; minus infinity for rows that a query does not see.

    Args:
        scores: `[..., n, T]` fp32, scaled dot products of n queries; overwritten.
        distance: `[n, T]`, position of each query minus that of each row.
        softcap: See `Seen`.
        window: See `Seen`.
    """
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return scores.masked_fill_(hidden, -torch.inf)


@torch.inference_mode()
def read(model: Any, token_ids: Sequence[int], watch: Watch) -> None:
    """Reads a text and calls `watch` with the inputs of each layer's attention, in order.

    Raises:
        ValueError: The layout of the model is not supported.
    """
    layers: set[int] = set()
    ids = torch.tensor([token_ids], device=model.device)
    with attending(model, _attend):
        # Only the decoder, since logits are not needed.
        model.get_decoder()(ids, use_cache=False, watch=watch, layers=layers)
    if len(layers) != num_with_keys(model):
        raise ValueError(UNKNOWN.format(type(model).__name__))


def num_with_keys(model: Any) -> int:
    """Number of layers that cache keys; recurrent layers keep a state instead, and feed-forward layers nothing."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    if types is None:
        return int(config.num_hidden_layers)
    return sum(kind not in RECURRENT | WITHOUT_CACHE for kind in types)


@contextmanager
def attending(model: Any, attend: Callable[..., tuple[torch.Tensor, None]]) -> Iterator[None]:
    """In this context, the model uses `attend`, a function with the signature of those of `transformers`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
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
    watch: Watch | None = None,
    layers: set[int] | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    # `query` is [1, H * G, T, head_size], the whole text at once, so the mask is only causal.
    if watch is None or layers is None or s_aux is not None or len(query) != 1:
        raise ValueError(UNKNOWN.format(type(module).__name__))
    layers.add(module.layer_idx)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    seen = Seen(module.layer_idx, query[0], key[0], value[0], scale, softcap, sliding_window)
    watch(seen)
    if softcap is None and sliding_window is None:
        attended = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    else:
        some = [weights.to(value.dtype) @ value[0, :, None] for weights in seen.attention(0)]
        attended = torch.cat(some, 2).flatten(0, 1)[None]
    return attended.transpose(1, 2).contiguous(), None
