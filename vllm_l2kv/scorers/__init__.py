"""Scorers of cached rows, one per file: rows with higher scores are kept sooner.

A scorer sees rows as the cache holds them (keys after RoPE, QK-norm and bias), and knows their layer and head. It
computes in fp32 whatever the cache's type: in bf16, three quarters of the norms tie. Every KV head is scored
independently, so neither the number of heads scored at once nor the tensor-parallel size changes which rows are kept. A
factor that is common to a layer (the scale of an fp8 cache) is left out.
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
    """The KV heads of one compactor: any heads of some layers, on one tensor-parallel rank.

    Attributes:
        layers: Indices of the layers in the model, in the order of the compactor's caches.
        of_layers: For each layer, indices of the heads in the model's layer, in the order of its cache.
        num_heads_of_model: KV heads of each layer in the model.
        device: Device of the caches.
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
            layers: See the attribute.
            num_heads_of_model: See the attribute; a divisor or a multiple of `degree`.
            rank: Tensor-parallel rank.
            degree: Tensor-parallel size.
            device: See the attribute.
        """
        layers, heads = tuple(layers), tuple(heads_of_rank(num_heads_of_model, rank, degree))
        return cls(layers, (heads,) * len(layers), num_heads_of_model, device)

    def place(self, layer: int, head: int = 0) -> int:
        """Index of a head among all heads, counted layer by layer.

        Args:
            layer: Index of the layer in `layers`.
            head: Index of the head in the layer's cache.
        """
        return sum(map(len, self.of_layers[:layer])) + head

    def numbers(self, layer: int) -> list[int]:
        """Numbers of a layer's heads, unique in the model and independent of ranks and groups.

        Args:
            layer: Index of the layer in `layers`.
        """
        first = self.layers[layer] * self.num_heads_of_model
        return [first + head for head in self.of_layers[layer]]


class Weights(NamedTuple):
    """The part of a profile that scorers use.

    Attributes:
        tensors: Tensors of `Profile.weights`, for all layers and KV heads of the model.
        rope: The profile's `Rope`.
    """

    tensors: Mapping[str, torch.Tensor]
    rope: Rope


class Rows(NamedTuple):
    """Rows of one layer that one request holds.

    Attributes:
        keys: `[num_heads, num_rows, head_size]`, any floating type.
        values: `[num_heads, num_rows, head_size_v]`, same type.
        layer: Index of the layer in `Heads.layers`.
        first_head: Index of the first of these heads in the layer's cache; the others follow it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    layer: int = 0
    first_head: int = 0


class Scorer:
    """Base class of scorers, which are bound once to the heads that they score. Each module here has one: `Bound`.

    A user's scorer is a subclass in any module; `engine_args(evaluation_scorers=["MODULE:CLASS"])` names it.

    Args:
        heads: The heads to score.
        weights: Weights of the engine's profile; `None` without a profile.
    """

    def __init__(self, heads: Heads, weights: Weights | None = None) -> None:
        self.heads = heads

    def score(self, rows: Rows) -> torch.Tensor:
        """The scores of `rows`: `[num_heads, num_rows]` fp32."""
        raise NotImplementedError

    @staticmethod
    def bytes_of_a_head(weights: Weights) -> int:
        """Device memory in bytes that the scorer holds for each head to which it is bound."""
        return 0


Scorers = Mapping[str, Scorer]
"""Values of `kv_scorer` to bound scorers."""


def bind(heads: Heads, weights: Weights | None = None, names: Iterable[str] = SCORERS) -> Scorers:
    """Binds scorers to the same heads.

    Args:
        heads: See `Scorer`.
        weights: See `Scorer`. Without weights, scorers that need a profile are left out.
        names: Names of scorers, see `class_of`.
    """
    given = (name for name in names if weights or name not in PROFILE_SCORERS)
    return {name: class_of(name)(heads, weights) for name in given}


def bytes_of_a_head(weights: Weights, names: Iterable[str] = SCORERS) -> int:
    """Device memory in bytes that these scorers hold for each head to which they are bound."""
    return sum(class_of(name).bytes_of_a_head(weights) for name in names)


def class_of(name: str) -> type[Scorer]:
    """The class of a scorer.

    Args:
        name: One of `vllm_l2kv.params.SCORERS`, or `MODULE:CLASS`.

    Raises:
        ValueError: The module cannot be imported, or has no such subclass of `Scorer`.
    """
    module, _, attribute = name.partition(":") if OWN_SCORER.fullmatch(name) else (f"{__name__}.{name}", "", "Bound")
    try:
        found = getattr(import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(
            f"scorer {name!r} cannot be imported ({error}); add the folder of its module to PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Scorer)):
        raise ValueError(f"scorer {name!r}: {module} must have a class {attribute} derived from {__name__}.Scorer.")
    return found


def norms(rows: torch.Tensor, order: float = 2) -> torch.Tensor:
    """Norms over the last dimension of `[..., size]`, in fp32: `[...]`; L2 unless another order is given."""
    lengths: torch.Tensor = torch.linalg.vector_norm(rows.float(), order, dim=-1)
    return lengths
