"""What a search may keep full: whole layers, or single KV heads, as units of one size.

A memory counts units, so a search need not know which of the two it chooses among. How many units may be full follows
from the pool: with heads, numbers that leave little of a block empty (`kv_heads.waste`). Each tensor-parallel rank
needs equally many full heads of a layer, so a unit of heads has one head of each rank.

Shapes: L layers, H KV heads.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from vllm_l2kv.kv_heads import MAX_WASTE, heads_of_rank, waste
from vllm_l2kv.profile import Shape, Target, ratio_for
from vllm_l2kv.settings import HEADS, LAYERS

TOGETHER = "together"
"""The order by all measurements."""


class Unit(NamedTuple):
    """KV heads of a layer, which are full together or not at all."""

    layer: int
    heads: tuple[int, ...]


class Order(NamedTuple):
    """Units that may stay full.

    Attributes:
        name: By what they are ordered.
        units: The first ones first.
    """

    name: str
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Units:
    """All units of a model that may compress.

    Attributes:
        classes: Whether they are `LAYERS` or `HEADS`.
        orders: All units by each measurement.
        together: All units by the sum of their places in these orders.
        counts: How many of them may be full, ascending.
    """

    classes: str
    orders: tuple[Order, ...]
    together: tuple[Unit, ...]
    counts: tuple[int, ...]

    def ratio(self, memory: float, num_full: int) -> float:
        """The keep ratio of the others with which the whole cache costs a memory."""
        return ratio_for(memory, len(self.together), num_full)

    def target(self, memory: float, full: Collection[Unit], scorer: str, lowest: float = 0.0) -> Target | None:
        """The setting with these units full that costs a memory.

        Args:
            memory: As of `Target`.
            full: Units.
            scorer: Of the others.
            lowest: Keep ratio of the others at least.

        Returns:
            `None` if so many may not be full, or if they cost too much.
        """
        ratio = self.ratio(memory, len(full))
        if len(full) not in self.counts or ratio <= 0 or ratio < lowest:
            return None
        if self.classes == LAYERS:
            return Target(memory, tuple(sorted(unit.layer for unit in full)), ratio, scorer)
        heads: dict[int, tuple[int, ...]] = {}
        for layer, of_unit in sorted(full):
            heads[layer] = tuple(sorted((*heads.get(layer, ()), *of_unit)))
        return Target(memory, (), ratio, scorer, heads)

    def with_layers(self, full: Collection[Unit], layers: Collection[int]) -> tuple[Unit, ...]:
        """The same units with all those of some layers.

        Where not so many may be full, the last ones of the others are left out.
        """
        added = [unit for unit in self.together if unit.layer in layers]
        others = [unit for unit in self.together if unit in full and unit not in added]
        most = len(added) + len(others)
        return (*added, *others)[: max((count for count in self.counts if count <= most), default=0)]


def layer_units(shape: Shape, measured: Mapping[str, torch.Tensor]) -> Units:
    """Whole layers.

    Args:
        shape: Of the model's cache.
        measured: By name, `[L]`: the larger, the more a layer is needed.
    """
    heads = tuple(range(shape.num_kv_heads))
    units = [Unit(layer, heads) for layer in shape.compressible]
    of_heads = {name: values[:, None].expand(-1, shape.num_kv_heads) for name, values in measured.items()}
    return _units(LAYERS, units, of_heads, range(len(units)))


def head_units(shape: Shape, measured: Mapping[str, torch.Tensor], num_ranks: int) -> Units | None:
    """Single KV heads; of several tensor-parallel ranks the most needed ones together, then the second ones, ...

    Args:
        shape: Of the model's cache.
        measured: By name, `[L, H]`: the larger, the more a head is needed.
        num_ranks: Tensor-parallel size, a divisor or a multiple of H.

    Returns:
        `None` if a rank has one head of a layer: then all that may be full is whole layers.
    """
    ranks = [heads_of_rank(shape.num_kv_heads, rank, num_ranks) for rank in range(num_ranks)]
    if len(ranks[0]) == 1:
        return None
    single = [Unit(layer, (head,)) for layer in shape.compressible for head in range(shape.num_kv_heads)]
    needed = _units(HEADS, single, measured, ()).together
    units = []
    for layer in shape.compressible:
        of_layer = [unit.heads[0] for unit in needed if unit.layer == layer]
        of_ranks = ([head for head in of_layer if head in heads] for heads in ranks)
        units += [Unit(layer, tuple(sorted(heads))) for heads in zip(*of_ranks, strict=True)]
    counts = [count for count in range(1, len(units)) if waste(count, len(units) - count) <= MAX_WASTE]
    found = _units(HEADS, units, measured, counts)
    return replace(found, orders=(*found.orders, Order(TOGETHER, found.together)))


def check_num_ranks(shape: Shape, num_ranks: int) -> None:
    """Refuses ranks that the heads of a layer cannot be dealt out to.

    Raises:
        ValueError: Names the option.
    """
    if shape.num_kv_heads % num_ranks and num_ranks % shape.num_kv_heads:
        raise ValueError(
            f"--tensor-parallel-size must be a divisor or a multiple of the model's {shape.num_kv_heads} KV heads, got "
            f"{num_ranks}."
        )


def _units(classes: str, units: Sequence[Unit], measured: Mapping[str, torch.Tensor], counts: Iterable[int]) -> Units:
    """Orders units by the sum of what is measured of their heads, `[L, H]`."""
    orders = []
    for name, values in measured.items():
        needs = [values[unit.layer, list(unit.heads)].sum().item() for unit in units]
        order = sorted(range(len(units)), key=lambda i: -needs[i])
        orders.append(Order(name, tuple(units[i] for i in order)))
    places = dict.fromkeys(units, 0)
    for each in orders:
        for place, unit in enumerate(each.units):
            places[unit] += place
    return Units(classes, tuple(orders), tuple(sorted(units, key=places.__getitem__)), tuple(counts))
