"""Made-up profiles, and weights of the scorer `learned`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_l2kv.profile import LEARNED, RECOMMENDED, Profile, Rope, Shape, Target
from vllm_l2kv.scorers import Weights
from vllm_l2kv.scorers.learned import DTYPES, num_features, shapes_of_a_head


def made_up_weights(num_layers: int, num_heads: int, head_size: int, rope: Rope | None = None) -> Weights:
    """Returns random weights with which every feature matters, in all layers and heads.

    Without `rope` all of a key is rotated, a quarter of its pairs slowly.
    """
    rope = rope or Rope(head_size, interleaved=False, slow_pairs=head_size // 8)
    generator = torch.Generator().manual_seed(num_layers * 100 + num_heads)
    f = num_features(head_size, head_size, rope)
    tensors = {
        name: torch.randn(num_layers, num_heads, *shape, generator=generator).div(f**0.5).to(DTYPES[name])
        for name, shape in shapes_of_a_head(f).items()
    }
    return Weights(tensors, rope)


def judged(outcomes: Iterable[tuple[Target, tuple[float, float]]]) -> dict[str, Any]:
    """What a profile says about its search: the shares of exact answers, hidden and seen, of each setting."""
    rows = [{"name": RECOMMENDED[target.classes], **target._asdict(), "exact": exact} for target, exact in outcomes]
    # A comparison that is not a setting of the profile comes first.
    first = {"name": "whole cache", "memory": 1.0, "exact": (1.0, 1.0)}
    return {"search": {"outcomes": [first, *rows]}}


def write_profile(
    path: Path,
    weights: Weights,
    fingerprint: str = "0" * 96,
    memory: tuple[Target, ...] = (),
    tensors: Mapping[str, torch.Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Profile:
    """Writes a profile of a model with full attention in all layers, with these weights and settings.

    `tensors`, if given, replace those of the weights.
    """
    num_layers, num_heads, num_features_of_weights = weights.tensors["wl"].shape
    head_size = (num_features_of_weights - num_features(0, 0, weights.rope)) // 2
    profile = Profile(
        model="made up",
        fingerprint=fingerprint,
        shape=Shape(num_layers, num_heads, head_size, ("full_attention",) * num_layers),
        rope=weights.rope,
        layer_order=tuple(range(num_layers)),
        memory=memory,
        about=about or {},
    )
    written = weights.tensors if tensors is None else tensors
    return profile.write(path, {LEARNED + name: tensor for name, tensor in written.items()})
