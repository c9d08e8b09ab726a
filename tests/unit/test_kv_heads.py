"""KV heads of ranks and of classes, and memory that classes waste."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_l2kv.kv_heads import MAX_WASTE, advice, are_even, check_full, classes_of, heads_of_rank, waste
from vllm_l2kv.settings import Settings


@given(degree=st.integers(1, 8), times=st.integers(1, 8))
def test_ranks_deal_heads_out_or_share_them(degree, times):
    dealt = [head for rank in range(degree) for head in heads_of_rank(degree * times, rank, degree)]
    assert dealt == list(range(degree * times))
    shared = [heads_of_rank(degree, rank, degree * times) for rank in range(degree * times)]
    assert shared == [range(rank // times, rank // times + 1) for rank in range(degree * times)]


def test_classes():
    settings = Settings((0,), {0: (1,), 1: (3, 0), 2: (0, 1, 2, 3)})
    classes = [classes_of(settings, layer, range(4)) for layer in range(4)]
    assert classes == [((), (0, 1, 2, 3)), ((1, 2), (0, 3)), ((), (0, 1, 2, 3)), ((0, 1, 2, 3), ())]
    assert classes_of(settings, 1, range(2, 4)) == ((2,), (3,))


@pytest.mark.parametrize(
    ("settings", "degree", "message"),
    [
        (Settings((0, 4)), 1, "full_layers names layer 4, but .* 0 to 3; change --kv-full-layers"),
        (Settings((), {7: (0,)}), 1, "full_heads names layer 7, but .* 0 to 3; change --kv-full-heads"),
        (Settings((), {1: (2, 4)}), 1, "KV head 4 of layer 1, but .* heads 0 to 3; change --kv-full-heads"),
        (Settings((), {1: (0, 1)}), 2, "KV heads of layer 1 on each of the 2 tensor-parallel ranks, got 2, 0;"),
        (Settings((), {1: (2,)}), 8, "of layer 1 on each of the 8 tensor-parallel ranks, got 0, 0, 0, 0, 1, 1, 0, 0;"),
    ],
)
def test_impossible_full_heads(settings, degree, message):
    with pytest.raises(ValueError, match=message):
        check_full(settings, range(4), 4, degree)


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_full_heads_that_ranks_share_evenly(degree):
    check_full(Settings((0,), {0: (1,), 1: (0, 1, 2, 3)}), range(4), 4, degree)
    if degree <= 2:
        check_full(Settings((), {1: (0, 3)}), range(4), 4, degree)
    assert are_even({1: (0, 1, 2, 3)}, 4, degree)
    assert are_even({1: (0, 1, 2, 3), 3: (0, 3)}, 4, degree) == (degree <= 2)
    assert are_even({1: (0, 1)}, 4, degree) == (degree == 1)


@given(one=st.integers(1, 300), other=st.integers(1, 300))
def test_waste_is_what_the_division_leaves(one, other):
    rarer, commoner = min(one, other), max(one, other)
    assert waste(one, other) == waste(other, one) == pytest.approx(commoner % rarer / commoner)
    assert waste(one, 0) == 0


@given(num_heads=st.integers(2, 300), factor=st.integers(1, 20))
def test_numbers_of_full_heads_that_waste_little(num_heads, factor):
    """Numbers to which a search for heads should round: the other heads are a multiple of them, or nearly."""
    num_full = num_heads // (1 + factor)
    if num_full and num_heads >= 128 and factor < 8:
        assert waste(num_full, num_heads - num_full) <= MAX_WASTE


@given(num_heads=st.integers(1, 300), data=st.data())
def test_advice_names_the_nearest_counts_that_waste_less(num_heads, data):
    num_full = data.draw(st.integers(0, num_heads))
    sentence = advice(num_full, num_heads)
    assert (sentence is None) == (waste(num_full, num_heads - num_full) <= MAX_WASTE)
    if sentence is not None:
        below, above = map(int, re.findall(r"name (\d+) or (\d+) heads", sentence)[0])
        assert below < num_full < above
        fits = [waste(n, num_heads - n) <= MAX_WASTE for n in range(below, above + 1)]
        assert fits == [True, *[False] * (above - below - 1), True]


def test_the_words_of_advice():
    assert advice(102, 256) == (
        "102 full KV heads of 256 leave 33.8% of each block of the smaller class empty; name 85 or 124 heads to leave "
        "at most 7%."
    )
