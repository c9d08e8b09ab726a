"""What a small network of each head makes of its own key and value; `vllm-l2kv profile` trains it.

A network of 64 hidden units has learned how much a repetition of the text attends to a row. Of the pairs that rotary
embeddings turn it sees the magnitudes, which no position changes. Of the slow pairs (`Rope.slow_pairs`) it sees the
elements too: they turn a little with the position, by less than a quarter circle over the longest context. It is
trained on rows at random positions, and so to score a row alike wherever it is.

Source: the target is that of KVzip, Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context
Reconstruction", arXiv 2505.23416; a gate that learns it is that of Fast KVzip, arXiv 2601.17668, which sees hidden
states. Features and the gate's shape are of this project.
"""

from collections.abc import Mapping
from itertools import chain

import torch
from torch.nn.functional import gelu

from vllm_l2kv.profile import LEARNED, Profile, Rope
from vllm_l2kv.scorers import Heads, Rows, Scorer, Weights, norms

HIDDEN = 64
"""Units of the hidden layer."""
LOWEST_NORM = 1e-6
"""A shorter key or value counts as one of this norm: zero has no logarithm."""


class Bound(Scorer):
    """`w2 . gelu(x w1 + b1) + wl . x + b`, where x are the features, rounded to bf16; products and sums in fp32.

    Attributes:
        w1: `[num_heads, num_features, HIDDEN]` bf16, of the heads that it is bound to, layer after layer.
        b1: `[num_heads, HIDDEN]` fp32.
        w2: `[num_heads, HIDDEN]` fp32.
        wl: `[num_heads, num_features]` bf16.
        b: `[num_heads]` fp32.
        rope: How keys are rotated.
    """

    def __init__(self, heads: Heads, weights: Weights | None = None) -> None:
        super().__init__(heads, weights)
        assert weights is not None, "the scorer learned needs a profile"
        layers = [layer for layer, own in zip(heads.layers, heads.of_layers, strict=True) for _ in own]
        places = list(chain(*heads.of_layers))

        def own(name: str) -> torch.Tensor:
            tensor = weights.tensors[name][layers, places]
            return tensor.to(heads.device, DTYPES[name]).contiguous()

        self.w1, self.b1, self.w2, self.wl, self.b = (own(name) for name in DTYPES)
        self.rope = weights.rope

    def score(self, rows: Rows) -> torch.Tensor:
        first = self.heads.place(rows.layer, rows.first_head)
        own = slice(first, first + rows.keys.shape[0])
        inputs = features(rows.keys, rows.values, self.rope).bfloat16()
        return scores_of(inputs, {name: getattr(self, name)[own] for name in DTYPES})

    @staticmethod
    def bytes_of_a_head(weights: Weights) -> int:
        return sum(weights.tensors[name][0, 0].numel() * dtype.itemsize for name, dtype in DTYPES.items())


DTYPES = {
    "w1": torch.bfloat16,
    "b1": torch.float32,
    "w2": torch.float32,
    "wl": torch.bfloat16,
    "b": torch.float32,
}
"""Tensors of the scorer, by their names in `Profile.weights`, to what they are on the device."""


def scores_of(inputs: torch.Tensor, networks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the networks of a layer's heads make of rows.

    Args:
        inputs: `[num_heads, num_rows, num_features]`, of `features`.
        networks: By the names in `DTYPES`, each `[num_heads, ...]`.

    Returns:
        `[num_heads, num_rows]` fp32.
    """
    x = inputs.float()
    hidden = gelu(x @ networks["w1"].float() + networks["b1"].unsqueeze(-2), approximate="tanh")
    # Sums of products in place of products of matrices, which GPUs may round to fewer bits.
    of_hidden = (hidden * networks["w2"].unsqueeze(-2)).sum(dim=-1)
    linear = (x * networks["wl"].float().unsqueeze(-2)).sum(dim=-1)
    return of_hidden + linear + networks["b"].unsqueeze(-1)


def weights_of(profile: Profile) -> Weights:
    """The weights in a profile, whose names and shapes are right: a wrong one would show at the first request.

    Raises:
        ValueError: The file is damaged, or has no such weights.
    """
    weights = profile.weights()
    heads = profile.shape.num_layers, profile.shape.num_kv_heads
    size = num_features(profile.shape.head_size, profile.shape.head_size, profile.rope)
    for name, shape in shapes_of_a_head(size).items():
        found = tuple(weights[name].shape) if name in weights else None
        if found != (*heads, *shape):
            raise ValueError(
                f"{profile.path} is damaged: {LEARNED}{name} is {found or 'missing'}, not {(*heads, *shape)}."
            )
    return Weights(weights, profile.rope)


def shapes_of_a_head(num_features: int) -> dict[str, tuple[int, ...]]:
    """Of each of its tensors."""
    return {
        "w1": (num_features, HIDDEN),
        "b1": (HIDDEN,),
        "w2": (HIDDEN,),
        "wl": (num_features,),
        "b": (),
    }


def num_features(head_size: int, head_size_v: int, rope: Rope) -> int:
    """Features of a row: `F` in the shapes of weights."""
    return head_size - rope.rotary_dim // 2 + 2 * rope.slow_pairs + head_size_v + 2


def features(keys: torch.Tensor, values: torch.Tensor, rope: Rope) -> torch.Tensor:
    """What the scorer sees of rows, for training and serving alike.

    The magnitudes of a key's rotated pairs; of the slow pairs all first elements, then all second ones; the key's other
    elements; those of the value; and the logarithms of the norms of key and value. As in every scorer, the scale of an
    fp8 cache is left out.

    Args:
        keys: `[..., head_size]` as they lie in the cache, after RoPE; any floating type.
        values: `[..., head_size_v]`, the same.
        rope: How keys are rotated.

    Returns:
        `[..., num_features]` fp32.
    """
    keys, values = keys.float(), values.float()
    first, second = pairs_of(keys, rope)
    slow = slow_pairs_of(keys, rope)
    others = keys[..., rope.rotary_dim :]
    lengths = (norms(part).clamp_min(LOWEST_NORM).log().unsqueeze(-1) for part in (keys, values))
    return torch.cat([(first.square() + second.square()).sqrt(), *slow, others, values, *lengths], dim=-1)


def pairs_of(keys: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second elements of the rotated pairs of `[..., head_size]`: views, `[..., rotary_dim / 2]` each."""
    rotated = keys[..., : rope.rotary_dim]
    if rope.interleaved:
        return rotated[..., ::2], rotated[..., 1::2]
    half = rope.rotary_dim // 2
    return rotated[..., :half], rotated[..., half:]


def slow_pairs_of(keys: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the slow pairs alone, which are the last ones: `[..., slow_pairs]` each."""
    first, second = pairs_of(keys, rope)
    fast = first.shape[-1] - rope.slow_pairs
    return first[..., fast:], second[..., fast:]
