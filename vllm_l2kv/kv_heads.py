"""KV heads by their numbers in the model: which a tensor-parallel rank holds, which never compact, what that wastes.

Standard library only.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from vllm_l2kv.settings import Settings

MAX_WASTE = 0.07
"""More waste than this is worth a word."""


class Classes(NamedTuple):
    """The KV heads of a layer on one rank, by their numbers in the model, ascending.

    Attributes:
        compressed: Those that compact.
        full: Those that never do.
    """

    compressed: tuple[int, ...]
    full: tuple[int, ...]

    @property
    def are_mixed(self) -> bool:
        """Whether there are heads of both classes, which need a cache each."""
        return bool(self.compressed and self.full)


def heads_of_rank(num_heads: int, rank: int, degree: int) -> range:
    """The heads that a tensor-parallel rank holds: its part of them, or one that several ranks have.

    Args:
        num_heads: KV heads of a layer in the model; a divisor or a multiple of `degree`.
        rank: The rank.
        degree: The number of ranks.
    """
    first = rank * num_heads // degree
    return range(first, first + max(num_heads // degree, 1))


def classes_of(settings: Settings, layer: int, heads: Iterable[int]) -> Classes:
    """Deals the heads of a layer out to the two classes.

    Args:
        settings: Name the full ones.
        layer: Index in the model.
        heads: Those that a rank holds.
    """
    heads = tuple(heads)
    named = heads if layer in settings.full_layers else settings.full_heads.get(layer, ())
    return Classes(tuple(head for head in heads if head not in named), tuple(head for head in heads if head in named))


def check_full(settings: Settings, layers: Collection[int], num_heads: int, degree: int) -> None:
    """Refuses full layers and heads that the model does not have, or that ranks hold in different numbers.

    Ranks share one plan of the pool, so each layer needs caches of equal sizes on all of them.

    Args:
        settings: Name them.
        layers: Indices of the model's layers.
        num_heads: KV heads of a layer in the model.
        degree: Tensor-parallel size.

    Raises:
        ValueError: Says which layer, which heads, and what to do.
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
        of_ranks = (classes_of(settings, layer, heads_of_rank(num_heads, rank, degree)) for rank in range(degree))
        counts = [len(classes.full) for classes in of_ranks]
        if len(set(counts)) > 1:
            raise ValueError(
                f"full_heads names {', '.join(map(str, counts))} KV heads of layer {layer} on the {degree} "
                "tensor-parallel ranks, and needs equally many on each; change --kv-full-heads or "
                "--tensor-parallel-size."
            )


def waste(one: int, other: int) -> float:
    """The share of a block that the rarer of two classes leaves empty.

    A block has the same bytes in both classes, and a whole number of times as many tokens in the rarer one
    (`kv_cache_spec.pack`). What the division leaves over is empty. How heads are spread over layers does not matter.

    Args:
        one: KV heads of one class, in all layers together; or its bytes of a token.
        other: The same of the other class; 0 of either class waste nothing.

    Returns:
        In [0, 0.5).
    """
    rarer, commoner = sorted((one, other))
    return 1 - commoner // rarer * rarer / commoner if rarer else 0.0


def advice(num_full: int, num_heads: int) -> str | None:
    """A sentence on a number of full heads that wastes more than `MAX_WASTE`; `None` for one that does not.

    Args:
        num_full: Full KV heads in all layers of full attention.
        num_heads: All their KV heads.
    """
    wasted = waste(num_full, num_heads - num_full)
    if wasted <= MAX_WASTE:
        return None
    fitting = [n for n in range(1, num_heads) if waste(n, num_heads - n) <= MAX_WASTE]
    below, above = max(n for n in fitting if n < num_full), min(n for n in fitting if n > num_full)
    return (
        f"{num_full} full KV heads of {num_heads} leave {wasted:.1%} of each block of the rarer class empty; "
        f"{below} or {above} would leave at most {MAX_WASTE:.0%}."
    )
