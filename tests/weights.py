"""Weights of the scorer `learned` that nothing was trained for."""

import torch

from vllm_l2kv.profile import LEARNED, Profile, Rope, Shape, Target
from vllm_l2kv.scorers import Weights
from vllm_l2kv.scorers.learned import DTYPES, HIDDEN, num_features


def made_up_weights(num_layers: int, num_heads: int, head_size: int, rope: Rope | None = None) -> Weights:
    """Random ones under which every feature counts, in all layers and heads; without `rope` all of a key is rotated."""
    rope = rope or Rope(head_size, interleaved=False)
    generator = torch.Generator().manual_seed(num_layers * 100 + num_heads)
    f = num_features(head_size, head_size, rope)
    shapes = {"w1": (f, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN,), "wl": (f,), "b": ()}
    assert shapes.keys() == DTYPES.keys()
    tensors = {
        name: torch.randn(num_layers, num_heads, *shape, generator=generator).div(f**0.5).to(DTYPES[name])
        for name, shape in shapes.items()
    }
    return Weights(tensors, rope)


def write_profile(path, weights: Weights, fingerprint: str = "0" * 96, memory: tuple[Target, ...] = ()) -> None:
    """A profile that holds these weights and settings, of a model with full attention in all layers."""
    num_layers, num_heads, num_features_of_weights = weights.tensors["wl"].shape
    head_size = (num_features_of_weights - 2 + weights.rope.rotary_dim // 2) // 2
    Profile(
        model="made up",
        fingerprint=fingerprint,
        shape=Shape(num_layers, num_heads, head_size, ("full_attention",) * num_layers),
        rope=weights.rope,
        layer_order=tuple(range(num_layers)),
        memory=memory,
    ).write(path, {LEARNED + name: tensor for name, tensor in weights.tensors.items()})
