"""The variants that `eval` compares: ways to compress the same prompt and its answer."""

from collections.abc import Iterable, Sequence
from itertools import product

from vllm_l2kv.params import CONTROLS, ONE_COMPACTION_SCORERS, CompressionParams
from vllm_l2kv.profile import ratio_for

BASELINE = CompressionParams(keep_ratio=1.0, protect_first=0, protect_last=0)
"""No compression. Protection has no effect here, but rows of the baseline have these values."""
DEFAULTS = CompressionParams()
SEEN, HIDDEN = QUESTIONS = ("seen", "hidden")
"""Seen: the question is compressed with its document. Hidden: the document is compressed before the question."""


def ratio_of_memory(memory: float, num_heads: int, num_full: int) -> float:
    """The keep ratio at which a request holds this share of its uncompressed memory.

    Args:
        memory: Share of the whole cache, in (0, 1].
        num_heads: KV heads of all layers without a sliding window.
        num_full: How many of these heads never compress.

    Raises:
        ValueError: Full heads alone cost as much.
    """
    ratio = ratio_for(memory, num_heads, num_full)
    if ratio <= 0:
        raise ValueError(
            f"M must be more than {num_full / num_heads:.3f}, the share of full layers and heads, got {memory:g}."
        )
    return ratio


def variants(
    scorers: Iterable[str],
    ratios: Iterable[float],
    protections: Sequence[tuple[int, int]] = ((DEFAULTS.protect_first, DEFAULTS.protect_last),),
    granularities: Sequence[str] = (DEFAULTS.granularity,),
    budgets: Iterable[int] = (),
) -> list[CompressionParams]:
    """The baseline, then every combination of ratio or budget with the others. Controls are added, by token only.

    Args:
        scorers: Names of `SCORERS`, or `MODULE:CLASS`.
        ratios: Keep ratios; 1 is the baseline.
        protections: Pairs of `protect_first` and `protect_last`.
        granularities: some of `GRANULARITIES`.
        budgets: Values of `max_tokens`; controls that do not work with a budget are left out.

    Raises:
        ParamError: A budget does not go with a protection, a scorer or a granularity.
    """
    kinds = [(scorer, granularity) for granularity in granularities for scorer in scorers]
    controls = [(control, "token") for control in CONTROLS if (control, "token") not in kinds]
    by_ratio = (
        CompressionParams(ratio, protect_first=first, protect_last=last, scorer=scorer, granularity=granularity)
        for (first, last), (scorer, granularity), ratio in product(protections, [*kinds, *controls], ratios)
        if ratio < 1
    )
    repeatable = [control for control in controls if control[0] not in ONE_COMPACTION_SCORERS]
    by_budget = (
        CompressionParams(max_tokens=budget, protect_first=first, protect_last=last, scorer=scorer, granularity=by)
        for (first, last), (scorer, by), budget in product(protections, [*kinds, *repeatable], budgets)
    )
    return list(dict.fromkeys([BASELINE, *by_ratio, *by_budget]))
