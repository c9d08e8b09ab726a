"""Units that a search may keep full: whole layers or single KV heads, all of the same size.

Memory is counted in units, so the search does not depend on what they are. The pool limits which numbers of units may
be full: for heads, only those that waste little of a block (`kv_heads.waste`). Each tensor-parallel rank needs the same
number of full heads of a layer, so a unit of heads has one head of each rank.

Shapes: L layers, H KV heads.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from vllm_l2kv.kv_heads import MAX_WASTE, heads_of_rank, waste
from vllm_l2kv.profile import Ranking, Shape, Target, ratio_for
from vllm_l2kv.settings import HEADS, LAYERS

TOGETHER = "together"
"""Name of the order by the sum of all measurements."""


class Unit(NamedTuple):
    """KV heads of a layer that are either all full or all compressed."""

    layer: int
    heads: tuple[int, ...]


class Order(NamedTuple):
    """An order of units.

    Attributes:
        name: Measurement by which they are ordered.
        units: The units, the most important ones first.
    """

    name: str
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Units:
    """All units of a model that may compress.

    Attributes:
        classes: What the units are: `LAYERS` or `HEADS`.
        orders: Orders of all units, one for each measurement.
        together: All units, by the sum of their ranks in these orders.
        counts: Allowed numbers of full units, ascending.
    """

    classes: str
    orders: tuple[Order, ...]
    together: tuple[Unit, ...]
    counts: tuple[int, ...]

    def ratio(self, memory: float, num_full: int) -> float:
        """The keep ratio of the other units at which the whole cache costs `memory`."""
        return ratio_for(memory, len(self.together), num_full)

    def target(self, memory: float, full: Collection[Unit], ranking: Ranking, lowest: float = 0.0) -> Target | None:
        """The setting with these full units that costs `memory`.

        Args:
            memory: See `Target`.
            full: Units that are full.
            ranking: How the others are ranked.
            lowest: Lowest allowed keep ratio of the others.

        Returns:
            `None` if this number of full units is not allowed, or costs too much.
        """
        ratio = self.ratio(memory, len(full))
        if len(full) not in self.counts or ratio <= 0 or ratio < lowest:
            return None
        if self.classes == LAYERS:
            layers = tuple(sorted(unit.layer for unit in full))
            return Target(memory, layers, ratio, ranking.scorer, {}, ranking.granularity)
        heads: dict[int, tuple[int, ...]] = {}
        for layer, of_unit in sorted(full):
            heads[layer] = tuple(sorted((*heads.get(layer, ()), *of_unit)))
        return Target(memory, (), ratio, ranking.scorer, heads, ranking.granularity)

    def with_layers(self, full: Collection[Unit], layers: Collection[int]) -> tuple[Unit, ...]:
        """The same units and all units of some layers.

        If their number is not allowed, the last ones of the other units are left out.
        """
        added = [unit for unit in self.together if unit.layer in layers]
        others = [unit for unit in self.together if unit in full and unit not in added]
        most = len(added) + len(others)
        return (*added, *others)[: max((count for count in self.counts if count <= most), default=0)]


def layer_units(shape: Shape, measured: Mapping[str, torch.Tensor]) -> Units:
    """Units that are whole layers.

    Args:
        shape: Shape of the model's KV cache.
        measured: Measurements by name, `[L]`; layers with larger values are more important.
    """
    heads = tuple(range(shape.num_kv_heads))
    units = [Unit(layer, heads) for layer in shape.compressible]
    of_heads = {name: values[:, None].expand(-1, shape.num_kv_heads) for name, values in measured.items()}
    return _units(LAYERS, units, of_heads, range(len(units)))


def head_units(shape: Shape, measured: Mapping[str, torch.Tensor], num_ranks: int) -> Units | None:
    """Units that are single KV heads. With several ranks, a unit has the most important head of each, and so on.

    Args:
        shape: Shape of the model's KV cache.
        measured: Measurements by name, `[L, H]`; heads with larger values are more important.
        num_ranks: Tensor-parallel size, a divisor or a multiple of H.

    Returns:
        `None` if a rank has a single head of a layer, so that only whole layers can be full.
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
    """Rejects a number of ranks among which the KV heads of a layer cannot be divided.

    Raises:
        ValueError: `num_ranks` is neither a divisor nor a multiple of the KV heads.
    """
    if shape.num_kv_heads % num_ranks and num_ranks % shape.num_kv_heads:
        raise ValueError(
            f"--tensor-parallel-size must be a divisor or a multiple of the model's {shape.num_kv_heads} KV heads, got "
            f"{num_ranks}."
        )


def _units(classes: str, units: Sequence[Unit], measured: Mapping[str, torch.Tensor], counts: Iterable[int]) -> Units:
    """Orders units by the sum of the measurements of their heads, `[L, H]`."""
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
