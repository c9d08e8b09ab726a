"""KV heads by their index in the model: which ones a rank holds, which ones never compact, and what that wastes.

Standard library only.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from vllm_l2kv.settings import FullHeads, Settings

MAX_WASTE = 0.07
"""Share of a block; above it, `advice` warns."""


class Classes(NamedTuple):
    """The KV heads of a layer on one rank, by their index in the model, ascending.

    Attributes:
        compressed: Heads that compact.
        full: Heads that never compact.
    """

    compressed: tuple[int, ...]
    full: tuple[int, ...]


def heads_of_rank(num_heads: int, rank: int, degree: int) -> range:
    """The heads that a tensor-parallel rank holds: its share, or one head that several ranks replicate.

    Args:
        num_heads: KV heads of a layer in the model; a divisor or a multiple of `degree`.
        rank: Tensor-parallel rank.
        degree: Tensor-parallel size.
    """
    first = rank * num_heads // degree
    return range(first, first + max(num_heads // degree, 1))


def classes_of(settings: Settings, layer: int, heads: Iterable[int]) -> Classes:
    """Divides the heads of a layer into the two classes.

    Args:
        settings: Name the full layers and heads.
        layer: Index of the layer in the model.
        heads: Heads that a rank holds.
    """
    heads = tuple(heads)
    named = heads if layer in settings.full_layers else settings.full_heads.get(layer, ())
    return Classes(tuple(head for head in heads if head not in named), tuple(head for head in heads if head in named))


def check_full(settings: Settings, layers: Collection[int], num_heads: int, degree: int) -> None:
    """Refuses full layers and heads that the model does not have, and full heads spread unevenly over the ranks.

    All ranks share one plan of the pool, so a layer's caches must have the same size on every rank.

    Args:
        settings: Name the full layers and heads.
        layers: Indices of the model's layers that have a KV cache.
        num_heads: KV heads of a layer in the model.
        degree: Tensor-parallel size.

    Raises:
        ValueError: Names the layer, the heads and what to do.
    """
    for name, named in (("full_layers", settings.full_layers), ("full_heads", settings.full_heads)):
        if unknown := sorted(set(named).difference(layers)):
            raise ValueError(
                f"{name} names layer {unknown[0]}, but this model's layers with a KV cache are "
                f"{min(layers)} to {max(layers)}; change --kv-{name.replace('_', '-')}."
            )
    for layer, heads in settings.full_heads.items():
        if heads[-1] >= num_heads:
            raise ValueError(
                f"full_heads names KV head {heads[-1]} of layer {layer}, but this model's layers have KV heads 0 to "
                f"{num_heads - 1}; change --kv-full-heads."
            )
        counts = _full_of_ranks(settings, layer, num_heads, degree)
        if len(set(counts)) > 1:
            raise ValueError(
                f"full_heads must name the same number of KV heads of layer {layer} on each of the {degree} "
                f"tensor-parallel ranks, got {', '.join(map(str, counts))}; change --kv-full-heads or "
                "--tensor-parallel-size, or take --kv-classes layers of a profile."
            )


def are_even(full_heads: FullHeads, num_heads: int, degree: int) -> bool:
    """Whether each rank has the same number of these full heads in each layer, as `check_full` requires.

    Args:
        full_heads: See `Settings`; no layer is full.
        num_heads: KV heads of a layer in the model.
        degree: Tensor-parallel size.
    """
    settings = Settings((), full_heads)
    return all(len(set(_full_of_ranks(settings, layer, num_heads, degree))) == 1 for layer in full_heads)


def _full_of_ranks(settings: Settings, layer: int, num_heads: int, degree: int) -> list[int]:
    """How many heads of a layer are full on each rank."""
    ranks = (heads_of_rank(num_heads, rank, degree) for rank in range(degree))
    return [len(classes_of(settings, layer, heads).full) for heads in ranks]


def waste(one: int, other: int) -> float:
    """The share of each block of the smaller class that stays empty.

    A block has the same bytes in both classes. The smaller class has fewer heads, so its block holds more tokens, by a
    whole factor (`kv_cache_spec.pack`); the remainder of that division stays empty. How heads are spread over layers
    does not matter.

    Args:
        one: KV heads of one class in all layers together, or its bytes per token.
        other: The same for the other class. If either is 0, nothing is wasted.

    Returns:
        In [0, 0.5).
    """
    rarer, commoner = sorted((one, other))
    return 1 - commoner // rarer * rarer / commoner if rarer else 0.0


def advice(num_full: int, num_heads: int) -> str | None:
    """A warning if this number of full heads wastes more than `MAX_WASTE` of a block, else `None`.

    Args:
        num_full: Full KV heads in all layers of full attention together.
        num_heads: All KV heads of these layers.
    """
    wasted = waste(num_full, num_heads - num_full)
    if wasted <= MAX_WASTE:
        return None
    fitting = [n for n in range(1, num_heads) if waste(n, num_heads - n) <= MAX_WASTE]
    below, above = max(n for n in fitting if n < num_full), min(n for n in fitting if n > num_full)
    return (
        f"{num_full} full KV heads of {num_heads} leave {wasted:.1%} of each block of the smaller class empty; name "
        f"{below} or {above} heads to leave at most {MAX_WASTE:.0%}."
    )
