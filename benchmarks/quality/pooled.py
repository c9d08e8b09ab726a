"""Pooled retrieval, the mean of the means of needles, pass keys and RULER, and its difference from the whole cache.

Intervals are for 95 %, by the bootstrap over prompts: prompts are resampled within each task, the same ones for a
method and for the whole cache, since both answered the same prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.quality.settings import RETRIEVAL

NUM_DRAWS = 10_000
Scores = Mapping[str, Sequence[float]]
"""For each task, a score for each prompt."""


class Interval(NamedTuple):
    """A value and its interval."""

    value: float
    low: float
    high: float


def pooled(scores: Scores) -> Interval:
    """Returns the pooled score of one setting."""
    return _interval({task: np.asarray(values) for task, values in scores.items()})


def difference(scores: Scores, others: Scores) -> Interval:
    """Returns the first setting's pooled score minus the second's; both answered the same prompts."""
    return _interval({task: np.asarray(values) - np.asarray(others[task]) for task, values in scores.items()})


def retrieval(cells: Sequence[Mapping[str, Any]]) -> Scores | None:
    """Returns the scores of one setting, length and question; `None` if a task is missing."""
    scores = {cell["task"]: cell["scores"] for cell in cells}
    return {task: scores[task] for task in RETRIEVAL} if set(RETRIEVAL) <= set(scores) else None


def _interval(values: Mapping[str, Any]) -> Interval:
    chance = np.random.default_rng(0)
    draws = [array[chance.integers(len(array), size=(NUM_DRAWS, len(array)))].mean(axis=1) for array in values.values()]
    low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
    return Interval(float(np.mean([array.mean() for array in values.values()])), float(low), float(high))
