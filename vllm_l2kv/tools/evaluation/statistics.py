"""Means with 95 % confidence intervals."""

import math
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

Z = 1.959964
"""Quantile of the normal distribution for a 95 % interval."""


class Moments(NamedTuple):
    """Number, mean and standard deviation of samples, from which an `Estimate` is computed.

    The standard deviation of a single sample is 0.
    """

    num_samples: int
    mean: float
    deviation: float


class Estimate(NamedTuple):
    """A mean, its 95 % confidence interval, and the number of samples."""

    mean: float
    low: float
    high: float
    num_samples: int


def moments(values: Sequence[float]) -> Moments:
    """Moments of one or more values."""
    return Moments(len(values), mean(values), stdev(values) if len(values) > 1 else 0.0)


def pooled(parts: Iterable[Moments]) -> Moments:
    """Moments of all values, from the moments of parts."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    n = sum(part.num_samples for part in parts)
    m = sum(part.num_samples * part.mean for part in parts) / n
    within = sum((part.num_samples - 1) * part.deviation**2 for part in parts)
    between = sum(part.num_samples * (part.mean - m) ** 2 for part in parts)
    return Moments(n, m, math.sqrt((within + between) / (n - 1)))


def share(scores: Moments) -> Estimate:
    """Mean of scores in [0, 1] with Wilson's interval.

    The interval is valid even if all samples are equal, as in very hard or very easy tasks. For scores strictly between
    0 and 1 it is conservative, since scores of 0 and 1 have the highest variance for a given mean.
    """
    n, p, _ = scores
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    # Rounding must not put a mean of 0 or 1 outside of its interval.
    return Estimate(p, min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p), n)


def average(values: Moments) -> Estimate:
    """Mean of unbounded numbers with Student's t interval, which is NaN for a single sample."""
    n, m, deviation = values
    if n == 1:
        return Estimate(m, math.nan, math.nan, 1)
    from scipy.stats import t  # type: ignore[import-untyped]

    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Estimate(m, m - half, m + half, n)
