"""Searches for the best full layers or heads, keep ratio and scorer, for several shares of memory.

All candidates for a memory cost exactly that share of the whole cache. Full layers are the first ones of an order: by
the attention of answers to facts, by that of a repetition of the text, by the loss of answers without a layer, and a
greedy order by the cost of answers with one more full layer. Full heads come from the first three orders, and from
their sum. Both are searched in the same way, as `units`. The cost of a candidate is the mean of `Losses.cost` over
questions about texts that were not trained on, equally many of each kind, each asked hidden and seen. All candidates
are tried on a few questions, the best ones on more, the best of these on all: of many candidates, the best on few
questions is the best by chance. Questions about other texts then judge the chosen settings.

What stays full is chosen with scorers that no text has trained. `learned` is tried with their choices only, since it
was trained on the kinds of text that the search asks about. It keeps answers there better than elsewhere, so a search
with it leaves less full: on SmolLM2 at 0.25 such a choice lost more than twice as much in other tasks
(docs/quality.md).

All candidates go by the granularity `neighbors`, since one lost token loses a value. A choice between it and `token` by
these questions did not hold for others: they chose `token` for `learned`, with which SmolLM2 lost more than twice as
much in other tasks at 0.25 (docs/quality.md).

The mean decides, not the worst kind of text: with little memory some kinds fail under every candidate, and would decide
alone. Only first ones of an order are tried, not all sets of layers: on SmolLM2, 300 more candidates with one layer
exchanged gained on the questions of the search, and lost as much on others.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from vllm_l2kv.cli_types import counted
from vllm_l2kv.params import PROFILE_SCORERS, CompressionParams
from vllm_l2kv.profile import BEST_WITH, RECOMMENDED, Ranking, Shape, Target, ratio_for
from vllm_l2kv.scorers import Scorers
from vllm_l2kv.settings import HEADS, LAYERS, FullHeads
from vllm_l2kv.tools.profile.choices import Case, Choice, kinds_of, losses, losses_of_cases, rank
from vllm_l2kv.tools.profile.units import Order, Unit, Units, head_units, layer_units
from vllm_l2kv.tools.progress import Progress

MEMORIES = (0.75, 0.5, 0.35, 0.25, 0.15)
CHOOSERS = ("l2", "keydiff_value")
"""Scorers with which full layers and heads are chosen, the fastest one first."""
SCORERS = (*CHOOSERS, *PROFILE_SCORERS)
"""Scorers that are tried, the fastest one first."""
GRANULARITY = "neighbors"
"""Granularity of all candidates."""
CHOOSING = tuple(Ranking(scorer, GRANULARITY) for scorer in CHOOSERS)
"""How rows are ranked while full layers and heads are chosen."""
CONTROL = Ranking("random")
WHOLE, NO_PROFILE, NOTHING_FULL = "whole cache", "no profile", "nothing full"
"""Names of outcomes with which the recommended settings are compared; see `Outcome`."""
GREEDY_MEMORY = 0.25
"""Memory of the greedy orders: with few full layers, the choice of each matters most."""
GREEDY_QUESTIONS = 24
"""Questions of the greedy orders, whose contexts stay on the device."""
FEW_QUESTIONS = 32
"""Questions on which all candidates are tried."""
SOME_QUESTIONS = 96
"""Questions on which the best of them are tried, if there are more."""
SHORTLIST = 12
"""Layers that are tried in each greedy step: the first ones of the other orders."""
NUM_COUNTS = 8
"""Numbers of full units that are tried for each order and memory."""
NUM_BEST = 5
"""Candidates for each memory and scorer that go on from the few questions, also with the first layers full."""
NUM_LAST = 3
"""Candidates for each memory and scorer that go on from some questions to all."""
FIRST_LAYERS = 2
"""Number of layers that the paper leaves full."""
NAMES = {
    LAYERS: (RECOMMENDED[LAYERS], "recommended layers, random rows", BEST_WITH[LAYERS]),
    HEADS: (RECOMMENDED[HEADS], "recommended heads, random rows", BEST_WITH[HEADS]),
}
"""Names of outcomes: the recommended setting, the same with random rows, and the best setting with a scorer."""
SAME_COST = 0.01
"""A slower scorer is chosen only if its mean cost of an answer is lower by more than this."""


class Outcome(NamedTuple):
    """Results of a setting on questions that the search did not use.

    Attributes:
        name: `WHOLE`; one of `NAMES`, some with a scorer; `NO_PROFILE`: the first layers full, `l2` elsewhere; or
            `NOTHING_FULL`: `l2` everywhere.
        memory: See `Target`.
        full_layers: See `Target`.
        keep_ratio: See `Target`.
        scorer: See `Target`.
        full_heads: See `Target`.
        granularity: See `Target`.
        loss: Loss of the answers in nats per token: question hidden, then seen.
        exact: Share of the questions that are answered exactly: question hidden, then seen.
        exact_by_kind: The same for each kind of text.
    """

    name: str
    memory: float
    full_layers: tuple[int, ...]
    keep_ratio: float
    scorer: str
    full_heads: FullHeads
    granularity: str
    loss: tuple[float, float]
    exact: tuple[float, float]
    exact_by_kind: dict[str, tuple[float, float]]

    @property
    def ranking(self) -> Ranking:
        """How rows are ranked."""
        return Ranking(self.scorer, self.granularity)


class Round(NamedTuple):
    """A round of the search.

    Attributes:
        questions: Number of questions, the same for every candidate.
        settings: Number of candidates.
    """

    questions: int
    settings: int


@dataclass(frozen=True)
class Recommendation:
    """The result of the search.

    Attributes:
        layer_order: All compressible layers, the most important ones first.
        targets: The recommended setting for each of `MEMORIES` and of `CLASSES`.
        others: The best settings of the other scorers.
        orders: Names of the orders from which the targets come.
        outcomes: Results of the targets, and of the settings with which they are compared.
        num_tried: Number of candidates.
        rounds: The rounds of the search; the last one had all questions.
        searched: Kinds of texts to their numbers of questions in the search.
        judged: Kinds of texts to their numbers of questions for the outcomes.
    """

    layer_order: tuple[int, ...]
    targets: tuple[Target, ...]
    others: tuple[Target, ...]
    orders: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    num_tried: int
    rounds: tuple[Round, ...]
    searched: dict[str, int]
    judged: dict[str, int]

    @property
    def num_searched(self) -> int:
        """Number of questions in the search."""
        return sum(self.searched.values())

    @property
    def num_judged(self) -> int:
        """Number of questions for the outcomes."""
        return sum(self.judged.values())


class _Candidate(NamedTuple):
    """A candidate of the search.

    Attributes:
        target: The setting.
        full: Units that are full.
        order: Name of the order from which these units come.
        cost: Mean cost of answers in the last round with this candidate.
    """

    target: Target
    full: tuple[Unit, ...]
    order: str
    cost: float = math.inf


class _Found(NamedTuple):
    """The result of searching among units of one of `CLASSES`.

    Attributes:
        classes: What the units are: one of `CLASSES`.
        recommended: The candidate for each memory.
        of_scorers: The best candidate for each memory and scorer.
        num_tried: Number of candidates.
        rounds: The rounds of the search.
    """

    classes: str
    recommended: list[_Candidate]
    of_scorers: list[_Candidate]
    num_tried: int
    rounds: list[Round]


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
    """Searches for the settings with the lowest cost of answers.

    Args:
        model: Model of `transformers`.
        shape: Shape of the model's KV cache.
        scorers: Scorers bound to all heads of the compressible layers, `learned` with the weights of this profile.
        questions: Questions for the search, with alternating kinds of text. The texts were used neither for training
            `learned` nor for measuring.
        others: Questions about other texts, to judge the results.
        measured: `retrieval`, `repetition` and `head_loss` of heads, `[L, H]`, and `loss` of layers, `[L]`, see
            `Measured`.
        num_ranks: Tensor-parallel size for which full heads are chosen.
        progress: Counts questions and layers.

    Raises:
        ValueError: There are no questions.
    """
    if not questions or not others:
        raise ValueError("The search has no questions; raise --samples or --tokens.")
    cases = [case for asked in questions for case in asked]
    lowest = _lowest_ratio(cases)
    of_heads = {name: measured[name] for name in ("retrieval", "repetition")}
    best_heads = {name: values.amax(-1) for name, values in of_heads.items()}
    layers = layer_units(shape, best_heads | {"loss": measured["loss"]})
    greedy = _greedy(model, shape, scorers, cases[: 2 * GREEDY_QUESTIONS], layers, lowest, progress)
    layers = replace(layers, orders=(*layers.orders, *greedy))
    heads = head_units(shape, of_heads | {"head loss": measured["head_loss"]}, num_ranks)
    found = [
        _search(model, shape, scorers, cases, units, lowest, progress) for units in (layers, heads) if units is not None
    ]
    outcomes = _outcomes(model, shape, scorers, [case for asked in others for case in asked], found, progress)
    chosen = [each for of_units in found for each in of_units.recommended]
    return Recommendation(
        tuple(unit.layer for unit in dict.fromkeys((*greedy[-1].units, *layers.together))),
        tuple(each.target for each in chosen),
        tuple(each.target for of_units in found for each in of_units.of_scorers if each not in of_units.recommended),
        tuple(each.order for each in chosen),
        outcomes,
        sum(of_units.num_tried for of_units in found),
        tuple(
            Round(same[0].questions, sum(each.settings for each in same))
            for same in zip(*(of_units.rounds for of_units in found), strict=True)
        ),
        kinds_of(questions),
        kinds_of(others),
    )


def choice_of(shape: Shape, target: Target) -> Choice:
    """Converts a setting to a choice."""
    compressible = set(shape.compressible).difference(target.full_layers)

    def ratios(layer: int) -> tuple[float, ...]:
        full = target.full_heads.get(layer, ()) if layer in compressible else range(shape.num_kv_heads)
        return tuple(1.0 if head in full else target.keep_ratio for head in range(shape.num_kv_heads))

    return Choice(target.ranking, tuple(map(ratios, range(shape.num_layers))))


def _lowest_ratio(cases: Sequence[Case]) -> float:
    """The lowest useful keep ratio: below it, protected rows alone take more memory than the ratio allows."""
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
) -> list[Order]:
    """A greedy order of layers for each of `CHOOSERS`, the fastest one first.

    Each step adds the layer with the lowest cost of answers, until memory is used up. It tries the first remaining
    layers of the sum of the other orders.
    """
    rows = [rank(model, shape, scorers, CHOOSING, case) for case in cases]

    def order(ranking: Ranking) -> tuple[Unit, ...]:
        chosen: tuple[Unit, ...] = ()
        progress.part(f"choosing layers with {ranking}", len(units.together), "layers at most")
        while True:
            others = [unit for unit in units.together if unit not in chosen][:SHORTLIST]
            targets = [units.target(GREEDY_MEMORY, (*chosen, unit), ranking, lowest) for unit in others]
            choices = [choice_of(shape, target) for target in targets if target is not None]
            if not choices:
                return chosen
            of_cases = [losses(model, case, each, choices).cost for case, each in zip(cases, rows, strict=True)]
            chosen = (*chosen, others[int(torch.stack(of_cases).mean(0).argmin())])
            progress.advance(1)

    return [Order(f"greedy with {ranking}", order(ranking)) for ranking in CHOOSING]


def _search(
    model: Any,
    shape: Shape,
    scorers: Scorers,
    cases: Sequence[Case],
    units: Units,
    lowest: float,
    progress: Progress,
) -> _Found:
    """Four rounds: all candidates; the best of them, also with the first layers full; the best of these; `learned`."""
    rounds: list[Round] = []

    def best(candidates: Sequence[_Candidate], num_questions: int, num: int) -> list[_Candidate]:
        """One round: the best `num` candidates for each memory and scorer on the first questions."""
        asked = cases[: 2 * num_questions]
        rounds.append(Round(len(asked) // 2, len(candidates)))
        progress.part(
            f"trying {counted(len(candidates), 'setting')} of {units.classes} on {_asked(asked)}", len(asked), "answers"
        )
        costs = _costs(model, shape, scorers, asked, candidates, progress)
        return _best_of_each([each._replace(cost=cost) for each, cost in zip(candidates, costs, strict=True)], num)

    tried = list(_candidates(units, lowest))
    left = best(tried, FEW_QUESTIONS, NUM_BEST)
    first = shape.compressible[:FIRST_LAYERS]
    with_first = [each for each in (_with_layers(units, each, first, lowest) for each in left) if each is not None]
    left = best([*left, *with_first], SOME_QUESTIONS, NUM_LAST)
    chosen = best(left, len(cases), 1)
    trained = _with_trained_scorers(chosen)
    chosen += best(trained, len(cases), 1)
    num_tried = len(tried) + len(with_first) + len(trained)
    return _Found(units.classes, _recommended(chosen), chosen, num_tried, rounds)


def _best_of_each(found: Sequence[_Candidate], num: int) -> list[_Candidate]:
    """The best `num` candidates for each memory and scorer."""
    of_each: dict[tuple[float, str], list[_Candidate]] = {}
    for candidate in sorted(found, key=lambda each: each.cost):
        of_each.setdefault((candidate.target.memory, candidate.target.scorer), []).append(candidate)
    return [candidate for of_one in of_each.values() for candidate in of_one[:num]]


def _with_trained_scorers(chosen: Sequence[_Candidate]) -> list[_Candidate]:
    """The same full units with the scorers that were trained, each once for a memory."""
    distinct = {(each.target.memory, each.full): each for each in chosen}
    return [
        each._replace(target=each.target._replace(scorer=scorer))
        for each in distinct.values()
        for scorer in PROFILE_SCORERS
    ]


def _recommended(chosen: Sequence[_Candidate]) -> list[_Candidate]:
    """For each memory the candidate with the fastest scorer among those of about the lowest cost."""
    recommended = []
    for memory in MEMORIES:
        of_memory = [each for each in chosen if each.target.memory == memory]
        enough = min((each.cost for each in of_memory), default=0.0) + SAME_COST
        good = [each for each in of_memory if each.cost <= enough]
        recommended += sorted(good, key=lambda each: SCORERS.index(each.target.scorer))[:1]
    return recommended


def _asked(cases: Sequence[Case]) -> str:
    """Number of questions, of which each is two cases: hidden and seen."""
    return counted(len(cases) // 2, "question")


def _candidates(units: Units, lowest: float) -> Iterator[_Candidate]:
    """All candidates: for each memory, order and one of `CHOOSERS`, several numbers of full units."""
    for memory in MEMORIES:
        counts = [count for count in units.counts if units.ratio(memory, count) >= lowest] or units.counts[:1]
        chosen = sorted({counts[round((len(counts) - 1) * i / (NUM_COUNTS - 1))] for i in range(NUM_COUNTS)})
        settings: dict[tuple[Unit, ...], str] = {}
        for order in units.orders:
            for count in chosen:
                if count <= len(order.units):
                    settings.setdefault(tuple(sorted(order.units[:count])), order.name)
        for full, name in settings.items():
            for ranking in CHOOSING:
                target = units.target(memory, full, ranking)
                if target is not None:
                    yield _Candidate(target, full, name)


def _with_layers(units: Units, candidate: _Candidate, layers: Sequence[int], lowest: float) -> _Candidate | None:
    """The candidate with some layers full too; `None` if they already are, or if they cost too much."""
    full = tuple(sorted(units.with_layers(candidate.full, layers)))
    target = units.target(candidate.target.memory, full, candidate.target.ranking, lowest)
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
    """Mean cost of the cases, half of which are hidden, for each candidate."""
    if not candidates:
        return []
    choices = [choice_of(shape, each.target) for each in candidates]
    costs: list[float] = losses_of_cases(model, shape, scorers, cases, choices, progress).cost.mean(0).tolist()
    return costs


def _outcomes(
    model: Any, shape: Shape, scorers: Scorers, cases: Sequence[Case], found: Sequence[_Found], progress: Progress
) -> tuple[Outcome, ...]:
    """Outcomes of the whole cache; of each target, also with random rows; without a profile; and with nothing full."""
    fastest = SCORERS[0]
    named = [(WHOLE, Target(1.0, (), 1.0, fastest))]
    first = shape.compressible[:FIRST_LAYERS]
    for memory in MEMORIES:
        ratio = ratio_for(memory, len(shape.compressible), len(first))
        if ratio > 0:
            named.append((NO_PROFILE, Target(memory, first, ratio, fastest)))
        named.append((NOTHING_FULL, Target(memory, (), memory, fastest)))
    for each in found:
        recommended, control, best = NAMES[each.classes]
        named += [(recommended, candidate.target) for candidate in each.recommended]
        named += [(control, candidate.target._replace(**CONTROL._asdict())) for candidate in each.recommended]
        named += [(f"{best} {candidate.target.scorer}", candidate.target) for candidate in each.of_scorers]
    progress.part(f"judging the results by {_asked(cases)}", len(cases), "answers")
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
