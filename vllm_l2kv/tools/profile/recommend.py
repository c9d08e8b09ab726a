"""Which layers stay full, at which ratio and with which scorer the others are compressed, for several memories.

All candidates for a memory cost exactly that share of the whole cache. Layers come from orders: by the attention of
answers to facts, by that of a repetition of the text, by the loss of answers when a layer is cut, and greedily by what
answers cost when one layer more stays full. What a candidate costs is the mean of `Losses.cost` over questions about
texts that nothing was trained on, equally many of each kind, each asked hidden and seen. All candidates are tried on a
few questions, then the best ones with one layer exchanged, added or left out; the best of all these on all questions.
Questions about other texts tell what the chosen ones lose.

The mean, not the worst kind: where memory is small, some kinds are lost under every candidate, and they would decide.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.profile import Shape, Target, ratio_for
from vllm_l2kv.scorers import Scorers
from vllm_l2kv.settings import FullHeads
from vllm_l2kv.tools.evaluation.progress import Progress
from vllm_l2kv.tools.profile.choices import Case, Choice, kinds_of, losses, losses_of_cases, rank

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
NUM_TURNS, NUM_CHANGED = 2, 20
"""How often the best candidate of each memory and scorer is changed a little, and into how many others."""
NUM_BEST = 3
"""Candidates of each memory and scorer that are tried on all questions, as they are and with the first layers full."""
CHANGED = ", changed"
"""Ends the name of the order that such a candidate comes from."""
FIRST_LAYERS = 2
"""The paper leaves so many full."""
SAME_COST = 0.01
"""Mean cost of an answer by which a scorer that takes longer has to be better."""


class Order(NamedTuple):
    """Layers that may stay full.

    Attributes:
        name: By what they are ordered.
        layers: The first ones first.
    """

    name: str
    layers: tuple[int, ...]


class Outcome(NamedTuple):
    """What a choice costs on the questions that the search did not use.

    Attributes:
        name: `whole cache`; `recommended`; `recommended layers, random rows`; `no profile`, where the model's first
            layers stay full and `l2` chooses in the others; or `best with` a scorer.
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
        targets: A setting for each of `MEMORIES`.
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
    """A setting of some memory, and the order that its layers come from."""

    target: Target
    order: str


class _Found(NamedTuple):
    """By a search.

    Attributes:
        chosen: One candidate for each memory.
        of_scorers: The best one for each memory and scorer.
        num_tried: Candidates.
        num_finalists: Those of them that were tried on all questions.
    """

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
    retrieval: torch.Tensor,
    repetition: torch.Tensor,
    loss: torch.Tensor,
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
        retrieval: `[L, H]`, attention from answers to the facts that they need.
        repetition: `[L, H]`, share of the rows that a repetition looks at.
        loss: `[L]`, loss of answers when a layer is cut.
        progress: Counts questions and layers.

    Raises:
        ValueError: There are no questions.
    """
    if not questions or not others:
        raise ValueError("A search needs questions: give more or longer texts.")
    cases = [case for asked in questions for case in asked]
    lowest = _lowest_ratio(cases)
    measured = {"retrieval": retrieval.amax(-1), "repetition": repetition.amax(-1), "loss": loss}
    orders = [Order(name, _ordered(shape, values)) for name, values in measured.items()]
    places = {layer: sum(order.layers.index(layer) for order in orders) for layer in shape.compressible}
    together = sorted(shape.compressible, key=places.__getitem__)
    greedy = _greedy(model, shape, scorers, cases[: 2 * GREEDY_QUESTIONS], together, lowest, progress)
    orders.append(Order("greedy", greedy))

    found = _search(model, shape, scorers, cases, orders, lowest, progress)
    outcomes = _outcomes(model, shape, scorers, [case for asked in others for case in asked], found, progress)
    return Recommendation(
        greedy + tuple(layer for layer in together if layer not in greedy),
        tuple(each.target for each in found.chosen),
        tuple(each.order for each in found.chosen),
        outcomes,
        found.num_tried,
        found.num_finalists,
        kinds_of(questions),
        kinds_of(others),
    )


def choice_of(shape: Shape, target: Target) -> Choice:
    """A setting as a choice."""
    compressed = set(shape.compressible) - set(target.full_layers)
    ratios = [target.keep_ratio if layer in compressed else 1.0 for layer in range(shape.num_layers)]
    return Choice(target.scorer, tuple(ratios))


def _lowest_ratio(cases: Sequence[Case]) -> float:
    """With which the protected rows of these contexts fill what is kept: below it, memory is not what it says."""
    protected = CompressionParams.protect_first + CompressionParams.protect_last
    return protected / min(len(case.context) for case in cases)


def _ordered(shape: Shape, values: torch.Tensor) -> tuple[int, ...]:
    """Compressible layers by descending values `[L]`."""
    numbers = values.tolist()
    return tuple(sorted(shape.compressible, key=lambda layer: -numbers[layer]))


def _greedy(
    model: Any,
    shape: Shape,
    scorers: Scorers,
    cases: Sequence[Case],
    together: Sequence[int],
    lowest: float,
    progress: Progress,
) -> tuple[int, ...]:
    """Layers, each the one with which answers cost least beside those before it, until memory is spent.

    Those that come first `together`, in all other orders, are tried.
    """
    scorer = GREEDY_SCORER if GREEDY_SCORER in scorers else SCORERS[0]
    rows = [rank(model, shape, scorers, [scorer], case) for case in cases]
    chosen: list[int] = []
    num_layers = len(shape.compressible)
    progress.part("choosing layers", num_layers, "layers at most")
    while (ratio := ratio_for(GREEDY_MEMORY, num_layers, len(chosen) + 1)) >= lowest and len(chosen) + 1 < num_layers:
        others = [layer for layer in together if layer not in chosen][:SHORTLIST]
        targets = [Target(GREEDY_MEMORY, tuple(sorted([*chosen, layer])), ratio, scorer) for layer in others]
        choices = [choice_of(shape, target) for target in targets]
        of_cases = [losses(model, case, each, choices).cost for case, each in zip(cases, rows, strict=True)]
        chosen.append(others[int(torch.stack(of_cases).mean(0).argmin())])
        progress.advance(1)
    return tuple(chosen)


def _search(
    model: Any,
    shape: Shape,
    scorers: Scorers,
    cases: Sequence[Case],
    orders: Sequence[Order],
    lowest: float,
    progress: Progress,
) -> _Found:
    """Tries candidates on a few questions, then on all of them the best ones, with the first layers full too."""
    tried, found = [], []
    few = cases[: 2 * FEW_QUESTIONS]
    more = list(_candidates(shape, scorers, orders, lowest))
    for turn in range(1 + NUM_TURNS):
        progress.part(f"trying {len(more)} settings", len(few), "questions asked")
        found += _costs(model, shape, scorers, few, more, progress)
        tried += more
        more = _changed(shape, tried, found, lowest, Random(turn))
    best = [tried[i] for i in _best(tried, found, NUM_BEST)]
    with_first = [each for each in (_with_first(shape, each, lowest) for each in best) if each is not None]
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
    return _Found(chosen, [finalists[i] for i in of_scorers], len(tried) + len(with_first), len(finalists))


def _best(candidates: Sequence[_Candidate], costs: Sequence[float], num: int) -> list[int]:
    """The best `num` of each memory and scorer; of each memory, those of quick scorers first."""
    of_each: dict[tuple[float, str], list[int]] = {(m, name): [] for m in MEMORIES for name in SCORERS}
    for i in sorted(range(len(candidates)), key=costs.__getitem__):
        of_each[candidates[i].target.memory, candidates[i].target.scorer].append(i)
    return [i for found in of_each.values() for i in found[:num]]


def _candidates(shape: Shape, scorers: Scorers, orders: Sequence[Order], lowest: float) -> Iterator[_Candidate]:
    """Settings that cost exactly a memory: of each order, several numbers of full layers with each scorer."""
    num_layers = len(shape.compressible)
    for memory in MEMORIES:
        most = max((n for n in range(num_layers) if ratio_for(memory, num_layers, n) >= lowest), default=0)
        counts = sorted({round(most * i / (NUM_COUNTS - 1)) for i in range(NUM_COUNTS)})
        settings: dict[tuple[int, ...], str] = {}
        for order in orders:
            for count in counts:
                if count <= len(order.layers):
                    settings.setdefault(tuple(sorted(order.layers[:count])), order.name)
        for full_layers, name in settings.items():
            ratio = ratio_for(memory, num_layers, len(full_layers))
            for scorer in SCORERS:
                if ratio > 0 and scorer in scorers:
                    yield _Candidate(Target(memory, full_layers, ratio, scorer), name)


def _changed(
    shape: Shape, tried: Sequence[_Candidate], costs: Sequence[float], lowest: float, chance: Random
) -> list[_Candidate]:
    """The best candidate of each memory and scorer with one full layer exchanged, added or left out; none twice."""
    known, found = [each.target for each in tried], []
    for i in _best(tried, costs, 1):
        target, order = tried[i]
        for _ in range(NUM_CHANGED):
            full_layers = set(target.full_layers)
            full_layers -= {chance.choice((None, *target.full_layers))}
            full_layers |= {chance.choice(shape.compressible)} if chance.random() < 2 / 3 else set()
            changed = _with_layers(shape, target, full_layers, lowest)
            if changed is not None and changed not in known:
                known.append(changed)
                found.append(_Candidate(changed, order.removesuffix(CHANGED) + CHANGED))
    return found


def _with_first(shape: Shape, candidate: _Candidate, lowest: float) -> _Candidate | None:
    """The same with the model's first layers full too; `None` if they are, or if they cost too much."""
    full_layers = {*candidate.target.full_layers, *shape.compressible[:FIRST_LAYERS]}
    target = _with_layers(shape, candidate.target, full_layers, lowest)
    if target is None or target == candidate.target:
        return None
    return _Candidate(target, f"{candidate.order}, first layers")


def _with_layers(shape: Shape, target: Target, full_layers: Collection[int], lowest: float) -> Target | None:
    """The same memory with other full layers; `None` if they cost too much."""
    ratio = ratio_for(target.memory, len(shape.compressible), len(full_layers))
    return target._replace(full_layers=tuple(sorted(full_layers)), keep_ratio=ratio) if ratio >= lowest else None


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
    model: Any, shape: Shape, scorers: Scorers, cases: Sequence[Case], found: _Found, progress: Progress
) -> tuple[Outcome, ...]:
    """Of the whole cache; and of each target, with random rows instead, and with equal counts in all layers."""
    named = [("whole cache", Target(1.0, (), 1.0, SCORERS[0]))]
    first = shape.compressible[:FIRST_LAYERS]
    for target, _ in found.chosen:
        named.append(("recommended", target))
        named.append(("recommended layers, random rows", target._replace(scorer=CONTROL)))
        ratio = ratio_for(target.memory, len(shape.compressible), len(first))
        if ratio > 0:
            named.append(("no profile", Target(target.memory, first, ratio, SCORERS[0])))
    named += [(f"best with {target.scorer}", target) for target, _ in found.of_scorers]
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
