"""Means with 95 % confidence intervals."""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

Z = 1.959964
"""Of the normal distribution, for 95 %."""


class Estimate(NamedTuple):
    """A mean, its interval, and its number of samples."""

    mean: float
    low: float
    high: float
    num_samples: int


def share(scores: Sequence[float]) -> Estimate:
    """Of scores in [0, 1], by Wilson's interval.

    It holds its promise where all samples agree, as those of hopeless and of easy tasks do. For scores between 0 and 1
    it is wider than need be: no scores of a given mean vary more than those of 0 and 1.
    """
    n, p = len(scores), mean(scores)
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    # Rounding must not put a mean of 0 or 1 outside.
    return Estimate(p, min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p), n)


def average(values: Sequence[float]) -> Estimate:
    """Of numbers without bounds, by Student's t; without an interval if there is but one."""
    n, m = len(values), mean(values)
    if n == 1:
        return Estimate(m, math.nan, math.nan, 1)
    from scipy.stats import t  # type: ignore[import-untyped]

    half = float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)
    return Estimate(m, m - half, m + half, n)
