"""Scores of cached rows, one scorer a file: the higher a score, the sooner a row is kept.

A scorer sees what lies in the cache (keys after RoPE, QK-norm and bias), and knows of which layer and head it is. It
works in fp32 whatever the cache's type: in bf16 three quarters of the norms tie. Every KV head of a layer is scored by
itself, so neither how many are scored at once nor the tensor-parallel degree changes what is kept. A factor common to a
layer (the scale of an fp8 cache) is left out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import torch

from vllm_l2kv.kv_heads import heads_of_rank
from vllm_l2kv.params import OWN_SCORER, PROFILE_SCORERS, SCORERS
from vllm_l2kv.profile import Rope


@dataclass(frozen=True)
class Heads:
    """The KV heads that one compactor holds: any of some layers, on one tensor-parallel rank.

    Attributes:
        layers: Indices in the model, in the order of the compactor's caches.
        of_layers: Heads of each of them, by their numbers in the layer, in the order of its cache.
        num_heads_of_model: KV heads of each layer in the model.
        device: Of the caches.
    """

    layers: tuple[int, ...]
    of_layers: tuple[tuple[int, ...], ...]
    num_heads_of_model: int
    device: torch.device

    @classmethod
    def of_rank(
        cls, layers: Iterable[int], num_heads_of_model: int, rank: int, degree: int, device: torch.device
    ) -> "Heads":
        """All heads of a tensor-parallel rank.

        Args:
            layers: As the attribute.
            num_heads_of_model: As the attribute; a divisor or a multiple of `degree`.
            rank: The rank.
            degree: The number of ranks.
            device: As the attribute.
        """
        layers, heads = tuple(layers), tuple(heads_of_rank(num_heads_of_model, rank, degree))
        return cls(layers, (heads,) * len(layers), num_heads_of_model, device)

    def place(self, layer: int, head: int = 0) -> int:
        """A head's place among all of them, layer after layer.

        Args:
            layer: The layer's place in `layers`.
            head: The head's place in the layer's cache.
        """
        return sum(map(len, self.of_layers[:layer])) + head

    def numbers(self, layer: int) -> list[int]:
        """Numbers of a layer's heads in the model, the same on any rank and in any group.

        Args:
            layer: The layer's place in `layers`.
        """
        first = self.layers[layer] * self.num_heads_of_model
        return [first + head for head in self.of_layers[layer]]


class Weights(NamedTuple):
    """What a profile holds for scorers.

    Attributes:
        tensors: Those of `Profile.weights`, of all layers and KV heads of the model.
        rope: That of the profile.
    """

    tensors: Mapping[str, torch.Tensor]
    rope: Rope


class Rows(NamedTuple):
    """Rows of one layer that one request holds.

    Attributes:
        keys: `[num_heads, num_rows, head_size]`, any floating type.
        values: `[num_heads, num_rows, head_size_v]`, the same.
        layer: The layer's place in `Heads.layers`.
        first_head: Place of the first of these heads in the layer's cache; the others are next to it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    layer: int = 0
    first_head: int = 0


class Scorer:
    """A scorer, bound once to what it will score. Each module has one, its class `Bound`.

    One of a user's own is a subclass anywhere; `engine_args(evaluation_scorers=["MODULE:CLASS"])` names it.

    Args:
        heads: What it will score.
        weights: Of the engine's profile; `None` without one.
    """

    def __init__(self, heads: Heads, weights: Weights | None = None) -> None:
        self.heads = heads

    def score(self, rows: Rows) -> torch.Tensor:
        """The scores of `rows`: `[num_heads, num_rows]` fp32."""
        raise NotImplementedError

    @staticmethod
    def bytes_of_a_head(weights: Weights) -> int:
        """Device memory that it holds for each layer and head to which it is bound."""
        return 0


Scorers = Mapping[str, Scorer]
"""Bound scorers by the values of `kv_scorer` that name them."""


def bind(heads: Heads, weights: Weights | None = None, names: Iterable[str] = SCORERS) -> Scorers:
    """Scorers that are bound to the same heads.

    Args:
        heads: As of `Scorer`.
        weights: As of `Scorer`. Scorers that need a profile are left out without one.
        names: As `class_of` takes them.
    """
    given = (name for name in names if weights or name not in PROFILE_SCORERS)
    return {name: class_of(name)(heads, weights) for name in given}


def bytes_of_a_head(weights: Weights, names: Iterable[str] = SCORERS) -> int:
    """Device memory that these scorers hold for each layer and head to which they are bound."""
    return sum(class_of(name).bytes_of_a_head(weights) for name in names)


def class_of(name: str) -> type[Scorer]:
    """The class of a scorer.

    Args:
        name: One of `vllm_l2kv.params.SCORERS`, or `MODULE:CLASS`.

    Raises:
        ValueError: The module cannot be imported, or has no such class.
    """
    module, _, attribute = name.partition(":") if OWN_SCORER.fullmatch(name) else (f"{__name__}.{name}", "", "Bound")
    try:
        found = getattr(import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(
            f"scorer {name!r} cannot be imported ({error}); Python looks for modules in the folders of PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Scorer)):
        raise ValueError(f"scorer {name!r}: {module} has no class {attribute} that derives from {__name__}.Scorer.")
    return found


def norms(rows: torch.Tensor, order: float = 2) -> torch.Tensor:
    """Norms of `[..., size]` in fp32: `[...]`; L2 unless another order is given."""
    lengths: torch.Tensor = torch.linalg.vector_norm(rows.float(), order, dim=-1)
    return lengths
