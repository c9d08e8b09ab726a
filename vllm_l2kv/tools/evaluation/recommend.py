"""Settings to begin with, by what `diagnose` measured. What is warned of, the recommendation follows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.tools.evaluation.diagnose import BAD_LOSS, JUDGED, KEEP_RATIOS, SINK, Diagnosis

MEASURED = "l2"
"""The scorer that keeps low norms, the only one that `diagnose` says something of."""
INSTEAD = "keydiff"
"""Where norms say nothing: the best of docs/quality.md for retrieval, on both of its models."""
MAX_FULL_LAYERS = 1 / 3
"""Share of the candidates that may be left full while any ratio is safe: each saves less."""
LOSS_BOUND = 0.1
"""Mean share of attention that a safe ratio may lose: chosen, not derived. An attention's output is a mean of values,
and this exchanges a tenth of its weights."""
BEYOND_FIRST = 2 / 3
"""Share of what random eviction loses that a safe ratio may lose apart from the first token: chosen, not derived."""
MAX_BLIND = 1 / 2
"""Share of the compressed heads in which norms may say nothing while their order is still used."""
MEANINGS = {
    "flat norms": "the order of norms is mostly chance",
    "no correlation": "low norms do not draw attention",
    "no better than random": "evicting by norm loses as much as evicting at random",
    "only the first token": "apart from the first token, evicting by norm is no better than at random",
    "first token at risk": "it draws much attention and low ratios evict it",
}
"""Flags of heads. All but the last mean that norms say nothing there."""
AT_RISK = "first token at risk"


@dataclass(frozen=True)
class Recommendation:
    """Settings to begin with.

    Attributes:
        full_layers: Layers to leave full.
        keep_ratio: The smallest of `KEEP_RATIOS` that is safe, 1 if none is or if nothing was measured of the scorer.
        scorer: `MEASURED`, or `INSTEAD` where norms say nothing.
        warnings: Sentences for the user. Each names what was found and what the settings do about it.
    """

    full_layers: tuple[int, ...]
    keep_ratio: float
    scorer: str
    warnings: tuple[str, ...]


def recommend(diagnosis: Diagnosis) -> Recommendation:
    """Layers to leave full, a keep ratio and a scorer, by attention mass.

    Layers whose heads lose, on average, more than `BAD_LOSS` of what random eviction loses at half the tokens stay
    full, the worst first, `MAX_FULL_LAYERS` of the layers at most, or as many more as make a ratio safe. The ratio is
    the smallest at which the other layers lose `LOSS_BOUND` or less on average, and apart from the first token no more
    than `BEYOND_FIRST` of what random eviction loses. Where norms say nothing in more than `MAX_BLIND` of the heads
    that are left, another scorer is recommended and, as nothing was measured of it, no ratio.
    """
    candidates = diagnosis.candidates
    judged, bound = diagnosis.loss[JUDGED].mean(-1).tolist(), BAD_LOSS * (1 - KEEP_RATIOS[JUDGED])
    bad = sorted((layer for layer in candidates if judged[layer] > bound), key=lambda layer: -judged[layer])
    few = min(len(bad), math.floor(MAX_FULL_LAYERS * len(candidates)))
    # Something must be left to compress.
    counts = range(few, min(len(bad) + 1, len(candidates)))
    full = tuple(sorted(bad[: next((n for n in counts if _safe_ratios(diagnosis, bad[:n])), few)]))
    compressed = [layer for layer in candidates if layer not in full]

    blind = torch.stack([raised for flag, raised in diagnosis.flags().items() if flag != AT_RISK]).any(0)[compressed]
    scorer = INSTEAD if blind.float().mean() > MAX_BLIND else MEASURED
    safe = _safe_ratios(diagnosis, full) if scorer == MEASURED else []
    ratio = min(safe, default=1.0)
    warnings = [*_of_heads(diagnosis, full, scorer, ratio)]
    if scorer != MEASURED:
        warnings.append(
            f"Norms say nothing in {int(blind.sum())} of {blind.numel()} heads that compress, so kv-scorer is "
            f"{scorer}. Norms are all that was measured, so no ratio is recommended: find one with `vllm-l2kv eval`."
        )
    else:
        warnings += _of_layers(diagnosis, full, few, sorted(set(bad) - set(full)), ratio)
        warnings += _of_ratios(diagnosis, compressed, ratio)
    return Recommendation(full, ratio, scorer, tuple(warnings))


def config_text(recommendation: Recommendation, model: str) -> str:
    """A file for `vllm-l2kv serve --config`."""
    lines = [
        f"# Recommended by `vllm-l2kv diagnose` for {model}, from attention mass: no promise about answers.",
        *(f"# {warning}" for warning in recommendation.warnings),
        f'kv-full-layers: "{",".join(map(str, recommendation.full_layers))}"',
        f"kv-default-keep-ratio: {recommendation.keep_ratio}",
        f"kv-protect-first: {CompressionParams.protect_first}",
        f"kv-scorer: {recommendation.scorer}",
    ]
    return "\n".join(lines) + "\n"


def _safe_ratios(diagnosis: Diagnosis, full_layers: Sequence[int]) -> list[float]:
    """Descending, down to the first that is not safe."""
    compressed = [layer for layer in diagnosis.candidates if layer not in full_layers]

    def is_safe(ratio: float) -> bool:
        loss, beyond_first = _losses(diagnosis, compressed, ratio)
        return loss <= LOSS_BOUND and beyond_first <= BEYOND_FIRST * (1 - ratio)

    return list(takewhile(is_safe, KEEP_RATIOS))


def _losses(diagnosis: Diagnosis, layers: Sequence[int], ratio: float) -> tuple[float, float]:
    """Mean shares of attention that these layers lose: of all, and of what the first token does not receive."""
    index = KEEP_RATIOS.index(ratio)
    return diagnosis.loss[index, layers].mean().item(), diagnosis.loss_beyond_first[index, layers].mean().item()


def _of_heads(diagnosis: Diagnosis, full: Sequence[int], scorer: str, ratio: float) -> Iterator[str]:
    """One sentence for each flag in full layers, and one for each in compressed layers."""
    num_heads = len(diagnosis.candidates) * diagnosis.variation.shape[1]
    for flag, raised in diagnosis.flags().items():
        layers = raised.any(-1).nonzero().flatten().tolist()
        compressed = [layer for layer in layers if layer not in full]
        consequences = {
            AT_RISK: "kv-protect-first keeps it",
            **dict.fromkeys(set(MEANINGS) - {AT_RISK}, _consequence(scorer, ratio)),
        }
        whole = [layer for layer in layers if layer in full]
        for chosen, consequence in ((whole, "left full"), (compressed, consequences[flag])):
            if chosen:
                heads = f"{int(raised[chosen].sum())} of {num_heads} heads, {_named(chosen)}"
                yield f"{flag}: {heads}; {MEANINGS[flag]}; {consequence}."


def _consequence(scorer: str, ratio: float) -> str:
    if scorer != MEASURED:
        return f"kv-scorer is {scorer} instead"
    return "the ratio counts what is lost" if ratio < 1 else "nothing is evicted"


def _of_layers(diagnosis: Diagnosis, full: Sequence[int], few: int, left: Sequence[int], ratio: float) -> Iterator[str]:
    if ratio == 1:
        return
    num_candidates = len(diagnosis.candidates)
    if len(full) > few:
        yield f"With fewer full layers no ratio is safe, so {num_candidates - len(full)} of {num_candidates} compress."
    if left:
        yield (
            f"Left to compress although they lose much: {_named(left)}. More full layers than {len(full)} "
            "would save little. The ratio counts what is lost."
        )


def _of_ratios(diagnosis: Diagnosis, compressed: Sequence[int], ratio: float) -> Iterator[str]:
    """Why no ratio is safe, or what the first token hides."""
    tried = KEEP_RATIOS[0] if ratio == 1 else ratio
    loss, beyond_first = _losses(diagnosis, compressed, tried)
    sink = diagnosis.sink[compressed].mean().item()
    of_the_rest = f"{beyond_first:.0%} of the rest, random eviction {1 - tried:.0%}"
    if ratio == 1 and loss > LOSS_BOUND:
        yield f"Keeping {tried:g} would lose {loss:.0%} of the attention; nothing is evicted."
    elif ratio == 1:
        yield (
            f"The first token receives {sink:.0%} of the attention. Keeping {tried:g} would lose {of_the_rest}; "
            "nothing is evicted."
        )
    elif sink >= SINK:
        yield f"The first token receives {sink:.0%} of the attention. Keeping {tried:g} loses {of_the_rest}."


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
