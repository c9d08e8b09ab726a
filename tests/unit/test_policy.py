import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import Compaction, compaction_of, num_keep


@given(n=st.integers(1, 200_000), hundredths=st.integers(1, 100))
def test_ceiling_of_the_ratio_as_it_is_written(n, hundredths):
    """Floats such as 0.07 * 100 == 7.000000000000001 must not keep one token too many."""
    assert num_keep(n, CompressionParams(hundredths / 100, 0, 0)) == math.ceil(Fraction(hundredths, 100) * n)


@given(
    n=st.integers(1, 10_000),
    ratio=st.floats(0, 1, exclude_min=True),
    first=st.integers(0, 20_000),
    last=st.integers(0, 20_000),
)
def test_bounds(n, ratio, first, last):
    keep = num_keep(n, CompressionParams(ratio, first, last))
    assert 1 <= keep <= n
    assert keep >= min(n, first + last)
    assert keep >= math.floor(ratio * n)
    assert keep <= max(math.ceil(ratio * n), first + last, 1)


@pytest.mark.parametrize(
    ("n", "params", "expected"),
    [
        (13, CompressionParams(0.6, 0, 0), 8),  # the notebook of the authors' code: 13 tokens, keep 0.6
        (100, CompressionParams(1 - 0.9, 0, 0), 10),  # int(100 * (1 - 0.9)) == 9
        (1, CompressionParams(1e-9, 0, 0), 1),
        (10, CompressionParams(0.1, 3, 3), 6),
        (10, CompressionParams(0.9, 3, 3), 9),
        (5, CompressionParams(0.1, 3, 3), 5),
    ],
)
def test_examples(n, params, expected):
    assert num_keep(n, params) == expected


@given(
    n=st.integers(1, 10_000), ratio=st.floats(0, 1, exclude_min=True), first=st.integers(0, 9), last=st.integers(0, 9)
)
def test_a_compaction_is_at_the_end_of_the_prompt_and_evicts_something(n, ratio, first, last):
    params = CompressionParams(ratio, first, last)
    keep = num_keep(n, params)
    if keep == n:
        assert compaction_of(n, params) is None
    else:
        assert compaction_of(n, params) == Compaction(position=n, num_rows=n, num_keep=keep)
        assert compaction_of(n, params).num_evicted == n - keep
