import math
import re
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_l2kv.capacity import Capacity, DoesNotFitError, GroupCapacity
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import CompactionPoints, Intervals

LONGEST = 120


class Asked(NamedTuple):
    """A request and its engine."""

    capacity: Capacity
    num_prompt_tokens: int
    max_tokens: int
    points: CompactionPoints | None

    def bound(self) -> int:
        return self.capacity.max_tokens(self.num_prompt_tokens, self.max_tokens, self.points)

    def needed(self) -> list[int]:
        """Returns the blocks for answers of 1, 2, ... tokens, the maximum of each group over all positions."""
        found, most = [], [0] * len(self.capacity.groups)
        last = self.num_prompt_tokens + self.max_tokens - 1
        compactions = {c.position: c for c in self.points.until(last)} if self.points else {}
        num_evicted = 0
        for position in range(1, last + 1):
            for i, blocks in enumerate(self._held(position, position - num_evicted)):
                most[i] = max(most[i], blocks)
            if position in compactions:
                num_evicted = compactions[position].num_evicted
            if position >= self.num_prompt_tokens:
                found.append(sum(map(max, most, self._held(position, self._rows_of_an_answer(position)))))
        return found

    def _held(self, num_tokens: int, num_rows: int) -> list[int]:
        drafts, longest = self.capacity.num_drafts, self.capacity.max_model_len
        found = []
        for group in self.capacity.groups:
            slots = min((num_rows if group.compressed else num_tokens) + drafts, longest)
            found.append(min(math.ceil(slots / group.block_size), group.max_blocks or slots))
        return found

    def _rows_of_an_answer(self, num_tokens: int) -> int:
        """Assumes that every answer reaches its interval, if it has enough tokens."""
        budget = self.points.params.max_tokens if self.points else None
        return 0 if budget is None else min(num_tokens, budget + self.points.intervals.answer)


@st.composite
def asked(draw) -> Asked:
    """Draws a compressed group, perhaps a full one with larger blocks, and one of a sliding window."""
    unit = draw(st.integers(1, 8))
    groups = [GroupCapacity(unit, compressed=True)]
    if draw(st.booleans()):
        groups.append(GroupCapacity(unit * draw(st.integers(1, 4)), compressed=False))
    if draw(st.booleans()):
        groups.append(GroupCapacity(unit, compressed=False, max_blocks=draw(st.integers(1, 5))))
    capacity = Capacity(draw(st.integers(1, 40)), tuple(groups), LONGEST, draw(st.integers(0, 3)))
    n = draw(st.integers(1, LONGEST - 1))
    max_tokens = draw(st.one_of(st.just(LONGEST - n), st.integers(1, LONGEST - n)))
    budget = draw(st.none() | st.integers(1, 40))
    ratio = draw(st.sampled_from([1.0, 0.5, 0.1]))
    params = CompressionParams(ratio, max_tokens=budget, protect_first=0, protect_last=0)
    points = CompactionPoints(n, params, Intervals(draw(st.integers(1, 40)), draw(st.integers(1, 40))))
    return Asked(capacity, n, max_tokens, points if params.compresses else None)


@settings(deadline=None, max_examples=300)
@given(request=asked())
def test_the_bound_is_its_own_or_the_largest_that_fits(request):
    """A bound that fits is unchanged; without a bound a request gets the largest that fits."""
    fits = [needed <= request.capacity.num_blocks for needed in request.needed()]
    assert fits == sorted(fits, reverse=True)
    if fits[-1]:
        assert request.bound() == request.max_tokens
    elif any(fits) and request.num_prompt_tokens + request.max_tokens == LONGEST:
        assert request.bound() == sum(fits)
    else:
        with pytest.raises(DoesNotFitError) as raised:
            request.bound()
        assert raised.value.param == ("max_tokens" if any(fits) else "kv_max_tokens")
        numbers = set(map(int, re.findall(r"\d+", str(raised.value))))
        assert {request.num_prompt_tokens, request.max_tokens, request.capacity.num_blocks} <= numbers
        assert {request.needed()[-1], *([sum(fits)] if any(fits) else [])} <= numbers


ONE_GROUP = Capacity(10, (GroupCapacity(16, compressed=True),), max_model_len=4096)


def points(n: int, **params) -> CompactionPoints:
    bare = {"protect_first": 0, "protect_last": 0}
    return CompactionPoints(n, CompressionParams(**{**bare, **params}), Intervals(64, 32))


@pytest.mark.parametrize(
    ("n", "max_tokens", "params", "bound"),
    [
        (100, 61, {}, 61),  # 160 rows: the last token is not computed
        (100, 3996, {}, 61),
        (4000, 96, {"max_tokens": 96}, 96),  # 96 + 64 rows
        (160, 3936, {"keep_ratio": 0.5}, 81),  # within the 80 freed rows, and the last token
        (1, 4095, {"max_tokens": 128}, 4095),  # the answer's interval is smaller
    ],
)
def test_examples(n, max_tokens, params, bound):
    assert ONE_GROUP.max_tokens(n, max_tokens, points(n, **params) if params else None) == bound


@pytest.mark.parametrize(
    ("n", "max_tokens", "params", "param", "message"),
    [
        (
            100,
            62,
            None,
            "max_tokens",
            "A prompt of 100 tokens with max_tokens=62 and no kv_max_tokens needs 11 blocks of the KV cache, which has "
            "10; max_tokens may be at most 61 here. Set kv_max_tokens, or lower max_tokens.",
        ),
        (
            161,
            3935,
            None,
            "kv_max_tokens",
            "A prompt of 161 tokens with max_tokens=3935 and no kv_max_tokens needs 256 blocks of the KV cache, which "
            "has 10; not even one token of an answer fits. Set kv_max_tokens.",
        ),
        (
            161,
            8,
            {"max_tokens": 97},
            "kv_max_tokens",
            "A prompt of 161 tokens with max_tokens=8 and kv_max_tokens=97 needs 11 blocks of the KV cache, which has "
            "10; not even one token of an answer fits. Lower kv_max_tokens.",
        ),
        (
            100,
            90,
            {"max_tokens": 129},
            "max_tokens",
            "A prompt of 100 tokens with max_tokens=90 and kv_max_tokens=129 needs 11 blocks of the KV cache, which "
            "has 10; max_tokens may be at most 61 here. Lower kv_max_tokens, or lower max_tokens.",
        ),
    ],
)
def test_a_refusal_names_the_numbers(n, max_tokens, params, param, message):
    with pytest.raises(DoesNotFitError) as raised:
        ONE_GROUP.max_tokens(n, max_tokens, points(n, **params) if params else None)
    assert raised.value.param == param
    assert str(raised.value) == message


def test_drafts_take_slots_beside_a_request_but_none_beyond_the_context():
    group = (GroupCapacity(16, compressed=True),)
    assert Capacity(10, group, max_model_len=4096, num_drafts=5).max_tokens(100, 3996, None) == 56
    assert Capacity(10, group, max_model_len=160, num_drafts=5).max_tokens(100, 60, None) == 60


def test_memory_of_the_whole_cache():
    """Heads are weighted by the bytes of their tokens."""
    groups = GroupCapacity(448, False), GroupCapacity(32, True)
    cache = Capacity(100, groups, max_model_len=4096, compressed_bytes=28, full_bytes=2)
    assert cache.memory_ratio(1000, 125) == (2 * 1000 + 28 * 125) / (30 * 1000)
    assert cache.memory_ratio(1000, 1000) == 1
    assert Capacity(100, groups[1:], max_model_len=4096).memory_ratio(1000, 125) == 0.125
