"""What is compared: ways of compressing one and the same prompt."""

from collections.abc import Iterable, Sequence
from itertools import product

from vllm_l2kv.params import CONTROLS, CompressionParams

BASELINE = CompressionParams(keep_ratio=1.0, protect_first=0, protect_last=0)
"""No compression. Its protection changes nothing; rows name the baseline by these values."""
DEFAULTS = CompressionParams()


def variants(
    scorers: Iterable[str],
    ratios: Iterable[float],
    protections: Iterable[tuple[int, int]] = ((DEFAULTS.protect_first, DEFAULTS.protect_last),),
    granularities: Sequence[str] = (DEFAULTS.granularity,),
) -> list[CompressionParams]:
    """Every combination, after the baseline; controls are added and measured token by token.

    Args:
        scorers: Names of `SCORERS`.
        ratios: Keep ratios; 1 is the baseline.
        protections: Pairs of `protect_first` and `protect_last`.
        granularities: `token`, `block`.
    """
    kinds = [(scorer, granularity) for granularity in granularities for scorer in scorers]
    kinds += [(control, "token") for control in CONTROLS if (control, "token") not in kinds]
    compressed = (
        CompressionParams(ratio, first, last, scorer=scorer, granularity=granularity)
        for (first, last), (scorer, granularity), ratio in product(protections, kinds, ratios)
        if ratio < 1
    )
    return list(dict.fromkeys([BASELINE, *compressed]))
