"""Scores rows with a small network for each head, from the row's key and value; `vllm-l2kv profile` trains it.

The network has 64 hidden units. It predicts how much attention a row gets when the model repeats the text. Its features
include the magnitudes of the pairs of elements that RoPE rotates, which do not depend on the position. For slow pairs
(`Rope.slow_pairs`) they also include the elements, which rotate by less than a quarter turn over the longest context.
Training places rows at random positions, so that a row's score depends little on its position.

Source: the training target is that of KVzip, Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context
Reconstruction", arXiv 2505.23416. A gate that learns it is from Fast KVzip, arXiv 2601.17668, where it reads hidden
states. Features and shape of the network are this project's.
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
"""Lower bound on norms before their logarithm is taken."""


class Bound(Scorer):
    """`w2 . gelu(x w1 + b1) + wl . x + b`, where x are the features, rounded to bf16; products and sums in fp32.

    Attributes:
        w1: `[num_heads, num_features, HIDDEN]` bf16, for the bound heads, layer by layer.
        b1: `[num_heads, HIDDEN]` fp32.
        w2: `[num_heads, HIDDEN]` fp32.
        wl: `[num_heads, num_features]` bf16.
        b: `[num_heads]` fp32.
        rope: How keys are rotated.
    """

    def __init__(self, heads: Heads, weights: Weights | None = None) -> None:
        super().__init__(heads, weights)
        assert weights is not None, "the scorer learned needs the weights of a profile"
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
"""Names of the scorer's tensors in `Profile.weights` to their types on the device."""


def scores_of(inputs: torch.Tensor, networks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Applies the networks of a layer's heads.

    Args:
        inputs: `[num_heads, num_rows, num_features]`, from `features`.
        networks: Weights by the names in `DTYPES`, each `[num_heads, ...]`.

    Returns:
        `[num_heads, num_rows]` fp32.
    """
    x = inputs.float()
    hidden = gelu(x @ networks["w1"].float() + networks["b1"].unsqueeze(-2), approximate="tanh")
    # Sums of products instead of matrix products, which GPUs may compute with fewer bits.
    of_hidden = (hidden * networks["w2"].unsqueeze(-2)).sum(dim=-1)
    linear = (x * networks["wl"].float().unsqueeze(-2)).sum(dim=-1)
    return of_hidden + linear + networks["b"].unsqueeze(-1)


def weights_of(profile: Profile) -> Weights:
    """Reads the weights in a profile and checks their shapes, which would otherwise fail at the first request.

    Raises:
        ValueError: The file is damaged, or has no weights of this scorer.
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
    """Names of the scorer's tensors to their shapes for a single head."""
    return {
        "w1": (num_features, HIDDEN),
        "b1": (HIDDEN,),
        "w2": (HIDDEN,),
        "wl": (num_features,),
        "b": (),
    }


def num_features(head_size: int, head_size_v: int, rope: Rope) -> int:
    """Number of features of a row."""
    return head_size - rope.rotary_dim // 2 + 2 * rope.slow_pairs + head_size_v + 2


def features(keys: torch.Tensor, values: torch.Tensor, rope: Rope) -> torch.Tensor:
    """The features of rows, for training and serving.

    In this order: magnitudes of the key's rotated pairs; for the slow pairs, all first elements, then all second
    elements; the key's other elements; the value's elements; the logarithms of the norms of key and value. As in every
    scorer, the scale of an fp8 cache is left out.

    Args:
        keys: `[..., head_size]` as in the cache, after RoPE; any floating type.
        values: `[..., head_size_v]`, same type.
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
    """First and second elements of the slow pairs, which are the last pairs: views, `[..., slow_pairs]` each."""
    first, second = pairs_of(keys, rope)
    fast = first.shape[-1] - rope.slow_pairs
    return first[..., fast:], second[..., fast:]
