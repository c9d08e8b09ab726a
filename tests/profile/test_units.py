"""Units that a search may keep full: numbers that fit the pool, and heads divided equally between ranks."""

import pytest
import torch

from vllm_l2kv.kv_heads import check_full, waste
from vllm_l2kv.profile import Ranking, Shape
from vllm_l2kv.settings import Settings
from vllm_l2kv.tools.profile.units import Unit, check_num_ranks, head_units, layer_units

SHAPE = Shape(13, 8, 64, ("sliding_attention", *("full_attention",) * 12))


def measured(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.rand(13, 8, generator=generator) for name in ("retrieval", "head loss")}
    for each in values.values():
        each[0] = torch.nan
    return values


def test_layers_are_units_of_all_their_heads():
    of_layers = {name: values.amax(-1) for name, values in measured(0).items()}
    units = layer_units(SHAPE, of_layers)
    assert units.counts == tuple(range(12))
    assert {unit.layer for unit in units.together} == set(range(1, 13))
    for name, order in units.orders:
        values = [of_layers[name][unit.layer].item() for unit in order]
        assert values == sorted(values, reverse=True)
    target = units.target(0.5, units.together[:3], Ranking("l2"))
    assert target.full_layers == tuple(sorted(unit.layer for unit in units.together[:3]))
    assert (target.keep_ratio, target.full_heads) == (0.333333, {})
    assert units.target(0.5, units.together[:6], Ranking("l2")) is None
    assert units.target(0.5, units.together[:3], Ranking("l2"), lowest=0.34) is None


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_heads_are_dealt_out_equally(num_ranks):
    values = measured(num_ranks)
    units = head_units(SHAPE, values, num_ranks)
    assert len(units.together) == 96 / num_ranks
    assert {(unit.layer, head) for unit in units.together for head in unit.heads} == {
        (layer, head) for layer in range(1, 13) for head in range(8)
    }
    assert [name for name, _ in units.orders] == ["retrieval", "head loss", "together"]
    for name, order in units.orders[:2]:
        sums = [values[name][unit.layer, list(unit.heads)].sum().item() for unit in order]
        assert sums == sorted(sums, reverse=True)
    for count in units.counts:
        target = units.target(0.99, units.orders[0].units[:count], Ranking("l2"))
        check_full(Settings((), target.full_heads), range(13), 8, num_ranks)
        num_full = SHAPE.num_full((), target.full_heads)
        assert num_full == count * num_ranks
        assert waste(num_full, 96 - num_full) <= 0.07
    # If the others are a multiple, nothing is wasted.
    assert {96 // num_ranks // (1 + times) for times in (1, 2, 3, 5, 7)} <= set(units.counts)


def test_the_best_head_of_each_rank_goes_first():
    values = {"retrieval": torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.5, 0.4, 0.8, 0.7]])}
    units = head_units(Shape(2, 4, 64, ("full_attention",) * 2), values, 2)
    assert units.together == (Unit(1, (0, 2)), Unit(0, (1, 2)), Unit(1, (1, 3)), Unit(0, (0, 3)))
    assert units.target(0.75, units.together[:2], Ranking("l2")).full_heads == {0: (1, 2), 1: (0, 2)}


def test_with_first_layers_so_many_are_full_as_fit():
    """8 of the first layer and 25 others would waste 9 %, so the last one is left out."""
    units = head_units(SHAPE, measured(0), 1)
    others = [unit for unit in units.together if unit.layer != 1]
    full = units.with_layers(others[:25], (1,))
    assert (33 in units.counts, 32 in units.counts) == (False, True)
    assert set(full) == {*(Unit(1, (head,)) for head in range(8)), *others[:24]}


@pytest.mark.parametrize("num_ranks", [8, 16])
def test_a_rank_with_one_head_has_whole_layers_alone(num_ranks):
    check_num_ranks(SHAPE, num_ranks)
    assert head_units(SHAPE, measured(0), num_ranks) is None


@pytest.mark.parametrize("num_ranks", [3, 12])
def test_heads_that_cannot_be_dealt_out_are_refused(num_ranks):
    with pytest.raises(ValueError, match=f"must be a divisor or a multiple of the model's 8 KV heads, got {num_ranks}"):
        check_num_ranks(SHAPE, num_ranks)
