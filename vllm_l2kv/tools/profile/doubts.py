"""What a search could not measure, as one line of warning.

The fewer questions, the less their share of exact answers says: Wilson's 95 % confidence interval is at most +-0.45 for
one question, +-0.22 for 16 and +-0.07 for 192, as many as judge by default on a GPU.
"""

from collections.abc import Iterator

from vllm_l2kv.cli_types import counted, listed
from vllm_l2kv.settings import CLASSES
from vllm_l2kv.tools.evaluation.statistics import Moments, share
from vllm_l2kv.tools.profile.recommend import FEW_QUESTIONS, NAMES, NOTHING_FULL, WHOLE, Outcome, Recommendation

MIN_QUESTIONS = FEW_QUESTIONS
"""Questions below which a warning is printed: the first round of the search needs as many. Half as many judge."""
NEARLY_NONE = 0.1
"""Share of answered questions up to which nothing can be compared: less than the uncertainty of 64 questions."""


def warning(found: Recommendation) -> str | None:
    """One line on what could not be measured, with a remedy; `None` if there is nothing to say."""
    doubts = list(_doubts(found))
    return f"Warning: {' '.join(doubts)}" if doubts else None


def weak_memories(found: Recommendation, classes: str) -> list[float]:
    """Memories, largest first, at which the setting of one of `CLASSES` is of no use.

    It answers fewer questions than the whole cache, and no more than `l2` in every layer.
    """
    of_names = {(outcome.name, outcome.memory): outcome for outcome in found.outcomes}
    whole = _share(of_names[WHOLE, 1.0])
    weak = {
        outcome.memory
        for outcome in found.outcomes
        if outcome.name == NAMES[classes][0]
        and _share(outcome) <= _share(of_names[NOTHING_FULL, outcome.memory])
        and whole - _share(outcome) > uncertainty(found.num_judged)
    }
    return sorted(weak, reverse=True)


def uncertainty(num_questions: int) -> float:
    """Largest half width of Wilson's 95 % confidence interval of a share of this many questions."""
    half = 0.5  # the share whose interval is widest
    return share(Moments(num_questions, half, 0.0)).high - half


def _doubts(found: Recommendation) -> Iterator[str]:
    if found.num_searched < MIN_QUESTIONS:
        yield (
            f"{counted(found.num_searched, 'question')} for the search and {found.num_judged} to judge are few: a "
            f"share may be wrong by {uncertainty(found.num_judged):.2f}; use --questions {MIN_QUESTIONS} or more."
        )
    (whole,) = (outcome for outcome in found.outcomes if outcome.name == WHOLE)
    if _share(whole) <= NEARLY_NONE:
        yield (
            f"The model answers only {_share(whole):.2f} of the questions with its whole cache, so the settings could "
            "not be compared; use lower --tokens, or a model that answers questions."
        )
        return
    for classes in CLASSES:
        if memories := weak_memories(found, classes):
            named = listed(f"{memory:g}" for memory in memories)
            yield (
                f"Full {classes} at memory {named} answer fewer questions than the whole cache, and no more than l2 "
                "with nothing full; use more memory, or a profile made with more --questions."
            )


def _share(outcome: Outcome) -> float:
    """Share of exact answers, hidden and seen together."""
    return sum(outcome.exact) / len(outcome.exact)
