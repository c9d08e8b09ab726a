"""Which layers or heads stay full, at which ratio and with which scorer the rest is compressed, for several memories.

All candidates for a memory cost exactly that share of the whole cache. Layers come from orders: by the attention of
answers to facts, by that of a repetition of the text, by the loss of answers when a layer is cut, and greedily by what
answers cost when one layer more stays full. Heads come from the first three, and from all of them together. Both are
searched in the same way, as `units`. What a candidate costs is the mean of `Losses.cost` over questions about
texts that nothing was trained on, equally many of each kind, each asked hidden and seen. All candidates are tried on a
few questions, the best ones on all. Questions about other texts tell what the chosen ones lose.

The mean, not the worst kind: where memory is small, some kinds are lost under every candidate, and they would decide.
Orders alone, not any set of layers: the best candidates with one layer exchanged were tried too, 300 more of them on
SmolLM2, and what they won on the questions that were searched with they lost on others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.profile import Shape, Target, ratio_for
from vllm_l2kv.scorers import Scorers
from vllm_l2kv.settings import HEADS, LAYERS, FullHeads
from vllm_l2kv.tools.profile.choices import Case, Choice, kinds_of, losses, losses_of_cases, rank
from vllm_l2kv.tools.profile.units import Order, Unit, Units, head_units, layer_units
from vllm_l2kv.tools.progress import Progress

MEMORIES = (0.75, 0.5, 0.35, 0.25, 0.15)
SCORERS = ("l2", "keydiff_value", "learned")
"""Tried, the cheapest one first."""
CONTROL = "random"
GREEDY_MEMORY, GREEDY_SCORER = 0.25, "learned"
"""Where layers are chosen greedily: the fewer layers stay full, the more each counts."""
GREEDY_QUESTIONS = 24
"""Whose contexts stay on the device meanwhile, at most."""
FEW_QUESTIONS = 32
"""On which all candidates are tried."""
SHORTLIST = 12
"""Layers that are tried next, those that the other orders have first."""
NUM_COUNTS = 8
"""Numbers of full layers that are tried of each order and memory."""
NUM_BEST = 3
"""Candidates of each memory and scorer that are tried on all questions, as they are and with the first layers full."""
FIRST_LAYERS = 2
"""The paper leaves so many full."""
NAMES = {
    LAYERS: ("recommended", "recommended layers, random rows", "best with"),
    HEADS: ("recommended heads", "recommended heads, random rows", "best heads with"),
}
"""Of outcomes: what is recommended, the same with random rows, and the best one of a scorer."""
SAME_COST = 0.01
"""Mean cost of an answer by which a scorer that takes longer has to be better."""


class Outcome(NamedTuple):
    """What a choice costs on the questions that the search did not use.

    Attributes:
        name: `whole cache`; one of `NAMES`, some with a scorer; or `no profile`, where the model's first layers stay
            full and `l2` chooses in the others.
        memory: As of `Target`.
        full_layers: The same.
        keep_ratio: The same.
        scorer: The same.
        full_heads: The same.
        loss: Nats a token of the answers: question hidden, then seen.
        exact: Share of the questions answered exactly: question hidden, then seen.
        exact_by_kind: The same for each kind of text.
    """

    name: str
    memory: float
    full_layers: tuple[int, ...]
    keep_ratio: float
    scorer: str
    full_heads: FullHeads
    loss: tuple[float, float]
    exact: tuple[float, float]
    exact_by_kind: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Recommendation:
    """What a profile says.

    Attributes:
        layer_order: All compressible layers, those that answers need most first.
        targets: A setting for each of `MEMORIES` and of `CLASSES`.
        orders: By the names of the orders that they come from.
        outcomes: What they and what they are compared with cost.
        num_tried: Candidates.
        num_finalists: Those of them that were tried on all questions.
        searched: Questions that were searched with, by kind of text.
        judged: Questions that the outcomes come from.
    """

    layer_order: tuple[int, ...]
    targets: tuple[Target, ...]
    orders: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    num_tried: int
    num_finalists: int
    searched: dict[str, int]
    judged: dict[str, int]


class _Candidate(NamedTuple):
    """A setting of some memory.

    Attributes:
        target: The setting.
        full: Units that stay full in it.
        order: Where they come from.
    """

    target: Target
    full: tuple[Unit, ...]
    order: str


class _Found(NamedTuple):
    """By a search.

    Attributes:
        classes: Of the units that were searched among.
        chosen: One candidate for each memory.
        of_scorers: The best one for each memory and scorer.
        num_tried: Candidates.
        num_finalists: Those of them that were tried on all questions.
    """

    classes: str
    chosen: list[_Candidate]
    of_scorers: list[_Candidate]
    num_tried: int
    num_finalists: int


def recommend(
    model: Any,
    shape: Shape,
    scorers: Scorers,
    questions: Sequence[Sequence[Case]],
    others: Sequence[Sequence[Case]],
    measured: Mapping[str, torch.Tensor],
    num_ranks: int,
    progress: Progress,
) -> Recommendation:
    """Searches for the settings under which answers cost least.

    Args:
        model: Of `transformers`.
        shape: Of it.
        scorers: Bound to its compressible layers and all of its heads, `learned` with the weights of this profile.
        questions: To search with, the kinds of text in turns: about texts that neither `learned` was trained on nor
            layers were measured on.
        others: About other texts again, to judge with.
        measured: `retrieval`, `repetition` and `head_loss` of heads `[L, H]`, and `loss` of layers `[L]`, as of
            `Measured`.
        num_ranks: Tensor-parallel size that full heads are to suit.
        progress: Counts questions and layers.

    Raises:
        ValueError: There are no questions.
    """
    if not questions or not others:
        raise ValueError("A search needs questions: give more or longer texts.")
    cases = [case for asked in questions for case in asked]
    lowest = _lowest_ratio(cases)
    of_heads = {name: measured[name] for name in ("retrieval", "repetition")}
    best_heads = {name: values.amax(-1) for name, values in of_heads.items()}
    layers = layer_units(shape, best_heads | {"loss": measured["loss"]})
    greedy = _greedy(model, shape, scorers, cases[: 2 * GREEDY_QUESTIONS], layers, lowest, progress)
    layers = replace(layers, orders=(*layers.orders, Order("greedy", greedy)))
    heads = head_units(shape, of_heads | {"head loss": measured["head_loss"]}, num_ranks)
    searched = [units for units in (layers, heads) if units is not None]
    found = [_search(model, shape, scorers, cases, units, lowest, progress) for units in searched]
    outcomes = _outcomes(model, shape, scorers, [case for asked in others for case in asked], found, progress)
    chosen = [each for of_units in found for each in of_units.chosen]
    return Recommendation(
        tuple(unit.layer for unit in (*greedy, *(unit for unit in layers.together if unit not in greedy))),
        tuple(each.target for each in chosen),
        tuple(each.order for each in chosen),
        outcomes,
        sum(of_units.num_tried for of_units in found),
        sum(of_units.num_finalists for of_units in found),
        kinds_of(questions),
        kinds_of(others),
    )


def choice_of(shape: Shape, target: Target) -> Choice:
    """A setting as a choice."""
    compressible = set(shape.compressible).difference(target.full_layers)

    def ratios(layer: int) -> tuple[float, ...]:
        full = target.full_heads.get(layer, ()) if layer in compressible else range(shape.num_kv_heads)
        return tuple(1.0 if head in full else target.keep_ratio for head in range(shape.num_kv_heads))

    return Choice(target.scorer, tuple(map(ratios, range(shape.num_layers))))


def _lowest_ratio(cases: Sequence[Case]) -> float:
    """With which the protected rows of these contexts fill what is kept: below it, memory is not what it says."""
    protected = CompressionParams.protect_first + CompressionParams.protect_last
    return protected / min(len(case.context) for case in cases)


def _greedy(
    model: Any,
    shape: Shape,
    scorers: Scorers,
    cases: Sequence[Case],
    units: Units,
    lowest: float,
    progress: Progress,
) -> tuple[Unit, ...]:
    """Layers, each the one with which answers cost least beside those before it, until memory is spent.

    Those that come first in all other orders together are tried.
    """
    scorer = GREEDY_SCORER if GREEDY_SCORER in scorers else SCORERS[0]
    rows = [rank(model, shape, scorers, [scorer], case) for case in cases]
    chosen: tuple[Unit, ...] = ()
    progress.part("choosing layers", len(units.together), "layers at most")
    while True:
        others = [unit for unit in units.together if unit not in chosen][:SHORTLIST]
        targets = [units.target(GREEDY_MEMORY, (*chosen, unit), scorer, lowest) for unit in others]
        choices = [choice_of(shape, target) for target in targets if target is not None]
        if not choices:
            return chosen
        of_cases = [losses(model, case, each, choices).cost for case, each in zip(cases, rows, strict=True)]
        chosen = (*chosen, others[int(torch.stack(of_cases).mean(0).argmin())])
        progress.advance(1)


def _search(
    model: Any,
    shape: Shape,
    scorers: Scorers,
    cases: Sequence[Case],
    units: Units,
    lowest: float,
    progress: Progress,
) -> _Found:
    """Tries candidates on a few questions, then on all of them the best ones, with the first layers full too."""
    tried = list(_candidates(units, scorers, lowest))
    few = cases[: 2 * FEW_QUESTIONS]
    progress.part(f"trying {len(tried)} settings of {units.classes}", len(few), "questions asked")
    best = [tried[i] for i in _best(tried, _costs(model, shape, scorers, few, tried, progress), NUM_BEST)]
    first = shape.compressible[:FIRST_LAYERS]
    with_first = [each for each in (_with_layers(units, each, first, lowest) for each in best) if each is not None]
    finalists = [*best, *with_first]
    progress.part(f"trying the best {len(finalists)} again", len(cases), "questions asked")
    costs = _costs(model, shape, scorers, cases, finalists, progress)
    of_scorers = _best(finalists, costs, 1)
    chosen = []
    for memory in MEMORIES:
        of_memory = [i for i in of_scorers if finalists[i].target.memory == memory]
        least = min((costs[i] for i in of_memory), default=0.0)
        # The quickest of those that are as good.
        chosen += [finalists[i] for i in of_memory if costs[i] <= least + SAME_COST][:1]
    best_of_scorers = [finalists[i] for i in of_scorers]
    return _Found(units.classes, chosen, best_of_scorers, len(tried) + len(with_first), len(finalists))


def _best(candidates: Sequence[_Candidate], costs: Sequence[float], num: int) -> list[int]:
    """The best `num` of each memory and scorer; of each memory, those of quick scorers first."""
    of_each: dict[tuple[float, str], list[int]] = {(m, name): [] for m in MEMORIES for name in SCORERS}
    for i in sorted(range(len(candidates)), key=costs.__getitem__):
        of_each[candidates[i].target.memory, candidates[i].target.scorer].append(i)
    return [i for found in of_each.values() for i in found[:num]]


def _candidates(units: Units, scorers: Scorers, lowest: float) -> Iterator[_Candidate]:
    """Settings that cost exactly a memory: of each order, several numbers of full units with each scorer."""
    for memory in MEMORIES:
        counts = [count for count in units.counts if units.ratio(memory, count) >= lowest] or units.counts[:1]
        chosen = sorted({counts[round((len(counts) - 1) * i / (NUM_COUNTS - 1))] for i in range(NUM_COUNTS)})
        settings: dict[tuple[Unit, ...], str] = {}
        for order in units.orders:
            for count in chosen:
                if count <= len(order.units):
                    settings.setdefault(tuple(sorted(order.units[:count])), order.name)
        for full, name in settings.items():
            for scorer in SCORERS:
                target = units.target(memory, full, scorer) if scorer in scorers else None
                if target is not None:
                    yield _Candidate(target, full, name)


def _with_layers(units: Units, candidate: _Candidate, layers: Sequence[int], lowest: float) -> _Candidate | None:
    """The same with some layers full too; `None` if they are, or if they cost too much."""
    full = tuple(sorted(units.with_layers(candidate.full, layers)))
    target = units.target(candidate.target.memory, full, candidate.target.scorer, lowest)
    if target is None or full == candidate.full:
        return None
    return _Candidate(target, full, f"{candidate.order}, first layers")


def _costs(
    model: Any,
    shape: Shape,
    scorers: Scorers,
    cases: Sequence[Case],
    candidates: Sequence[_Candidate],
    progress: Progress,
) -> list[float]:
    """Mean cost of the cases, half of which are hidden, under each candidate."""
    if not candidates:
        return []
    choices = [choice_of(shape, each.target) for each in candidates]
    costs: list[float] = losses_of_cases(model, shape, scorers, cases, choices, progress).cost.mean(0).tolist()
    return costs


def _outcomes(
    model: Any, shape: Shape, scorers: Scorers, cases: Sequence[Case], found: Sequence[_Found], progress: Progress
) -> tuple[Outcome, ...]:
    """Of the whole cache; of each target, also with random rows; and of equal counts in all layers."""
    named = [("whole cache", Target(1.0, (), 1.0, SCORERS[0]))]
    first = shape.compressible[:FIRST_LAYERS]
    for memory in MEMORIES:
        ratio = ratio_for(memory, len(shape.compressible), len(first))
        if ratio > 0:
            named.append(("no profile", Target(memory, first, ratio, SCORERS[0])))
    for each in found:
        recommended, control, best = NAMES[each.classes]
        named += [(recommended, candidate.target) for candidate in each.chosen]
        named += [(control, candidate.target._replace(scorer=CONTROL)) for candidate in each.chosen]
        named += [(f"{best} {candidate.target.scorer}", candidate.target) for candidate in each.of_scorers]
    progress.part("judging what was found", len(cases), "questions asked")
    choices = [choice_of(shape, target) for _, target in named]
    lost = losses_of_cases(model, shape, scorers, cases, choices, progress)
    kinds = sorted({case.kind for case in cases})

    def both(values: torch.Tensor, *of_kinds: str) -> tuple[float, float]:
        """Means of `[N]` over the hidden and the seen cases of these kinds."""
        which = [[case.hidden is hidden and case.kind in of_kinds for case in cases] for hidden in (True, False)]
        first, second = (round(values[torch.tensor(each)].mean().item(), 4) for each in which)
        return first, second

    return tuple(
        Outcome(
            name,
            *target,
            both(lost.loss[:, i], *kinds),
            both(exact := lost.exact[:, i].float(), *kinds),
            {kind: both(exact, kind) for kind in kinds},
        )
        for i, (name, target) in enumerate(named)
    )
