"""Which layers stay full, at which ratio and with which scorer the others are compressed, for several memories.

All candidates for a memory cost exactly that share of the whole cache. Layers come from orders: by the attention of
answers to facts, by that of a repetition of the text, by the loss of answers when a layer is cut, and greedily by the
loss of answers when one layer more stays full. What a candidate is judged by is the loss of answers to questions about
texts that nothing was trained on; some of these are held out, to tell what the chosen ones lose.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.profile import Shape, Target, ratio_for
from vllm_l2kv.scorers import Scorers
from vllm_l2kv.tools.evaluation.progress import Progress
from vllm_l2kv.tools.profile.calibration import Sample
from vllm_l2kv.tools.profile.choices import Case, Choice, answerable, losses, losses_of_cases, rank

MEMORIES = (0.75, 0.5, 0.35, 0.25, 0.15)
SCORERS = ("l2", "keydiff_value", "learned")
"""Tried, the cheapest one first."""
CONTROL = "random"
GREEDY_MEMORY, GREEDY_SCORER = 0.25, "learned"
"""Where layers are chosen greedily: the fewer layers stay full, the more each counts."""
GREEDY_CASES = 48
"""Whose contexts stay on the device meanwhile, at most."""
SHORTLIST = 12
"""Layers that are tried next, those that the other orders have first."""
NUM_COUNTS = 8
"""Numbers of full layers that are tried of each order and memory."""
NUM_REFINED = 3
"""Candidates of each memory and scorer with which the first layers are tried too."""
FIRST_LAYERS = 2
"""The paper leaves so many full."""
SAME_LOSS = 0.02
"""Nats a token, by which a scorer that costs more has to be better."""
HELD_OUT = 3
"""One of so many questions is not searched with."""


class Order(NamedTuple):
    """Layers that may stay full.

    Attributes:
        name: By what they are ordered.
        layers: The first ones first.
    """

    name: str
    layers: tuple[int, ...]


class Outcome(NamedTuple):
    """What a choice costs on the questions that were held out.

    Attributes:
        name: `whole cache`; `recommended`; `recommended layers, random rows`; `no profile`, where the model's first
            layers stay full and `l2` chooses in the others; or `best with` a scorer.
        memory: As of `Target`.
        full_layers: The same.
        keep_ratio: The same.
        scorer: The same.
        loss: Nats a token of the answers: question hidden, then seen.
        exact: Share of the questions answered exactly: question hidden, then seen.
    """

    name: str
    memory: float
    full_layers: tuple[int, ...]
    keep_ratio: float
    scorer: str
    loss: tuple[float, float]
    exact: tuple[float, float]


@dataclass(frozen=True)
class Recommendation:
    """What a profile says.

    Attributes:
        layer_order: All compressible layers, those that answers need most first.
        targets: A setting for each of `MEMORIES`.
        orders: By the names of the orders that they come from.
        outcomes: What they and what they are compared with cost.
        num_tried: Candidates.
        num_questions: Searched with, and held out.
    """

    layer_order: tuple[int, ...]
    targets: tuple[Target, ...]
    orders: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    num_tried: int
    num_questions: tuple[int, int]


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
    """

    chosen: list[_Candidate]
    of_scorers: list[_Candidate]
    num_tried: int


def recommend(
    model: Any,
    shape: Shape,
    scorers: Scorers,
    samples: Sequence[Sample],
    retrieval: torch.Tensor,
    repetition: torch.Tensor,
    loss: torch.Tensor,
    num_questions: int,
    progress: Progress | None = None,
) -> Recommendation:
    """Searches for the settings under which answers lose least.

    Args:
        model: Of `transformers`.
        shape: Of it.
        scorers: Bound to its compressible layers and all of its heads, `learned` with the weights of this profile.
        samples: Texts that neither `learned` was trained on nor layers were measured on.
        retrieval: `[L, H]`, attention from answers to the facts that they need.
        repetition: `[L, H]`, share of the rows that a repetition looks at.
        loss: `[L]`, loss of answers when a layer is cut.
        num_questions: Asked, at most.
        progress: Counts questions and layers.

    Raises:
        ValueError: The texts have too few questions.
    """
    progress = progress or Progress()
    progress.begin("searching for settings")
    questions = answerable(model, shape, samples, num_questions, progress)
    if len(questions) < HELD_OUT:
        raise ValueError(f"A search needs at least {HELD_OUT} questions, got {len(questions)}; give more texts.")
    held_out = [case for cases in questions[::HELD_OUT] for case in cases]
    searched = [case for i, cases in enumerate(questions) if i % HELD_OUT for case in cases]
    lowest = _lowest_ratio(searched)
    measured = {"retrieval": retrieval.amax(-1), "repetition": repetition.amax(-1), "loss": loss}
    orders = [Order(name, _ordered(shape, values)) for name, values in measured.items()]
    places = {layer: sum(order.layers.index(layer) for order in orders) for layer in shape.compressible}
    together = sorted(shape.compressible, key=places.__getitem__)
    greedy = _greedy(model, shape, scorers, searched[:GREEDY_CASES], together, lowest, progress)
    orders.append(Order("greedy", greedy))

    found = _search(model, shape, scorers, searched, orders, lowest, progress)
    outcomes = _outcomes(model, shape, scorers, held_out, found, progress)
    return Recommendation(
        greedy + tuple(layer for layer in together if layer not in greedy),
        tuple(each.target for each in found.chosen),
        tuple(each.order for each in found.chosen),
        outcomes,
        found.num_tried,
        (len(searched) // 2, len(held_out) // 2),
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
    """Layers, each the one with which answers lose least beside those before it, until memory is spent.

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
        of_cases = [losses(model, case, each, choices).loss for case, each in zip(cases, rows, strict=True)]
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
    """Tries candidates, then the best of each memory and scorer with the first layers full too."""
    tried = list(_candidates(shape, scorers, orders, lowest))
    progress.part(f"trying {len(tried)} settings", len(cases), "questions asked")
    cost = _costs(model, shape, scorers, cases, tried, progress)
    by_kind: dict[tuple[float, str], list[int]] = {}
    for i in sorted(range(len(tried)), key=cost.__getitem__):
        by_kind.setdefault((tried[i].target.memory, tried[i].target.scorer), []).append(i)
    refined = [_with_first(shape, tried[i], lowest) for best in by_kind.values() for i in best[:NUM_REFINED]]
    more = [each for each in refined if each is not None]
    progress.part(f"trying {len(more)} more", len(cases), "questions asked")
    cost += _costs(model, shape, scorers, cases, more, progress)
    tried += more
    chosen, of_scorers = [], []
    for memory in MEMORIES:
        best = []
        for scorer in SCORERS:
            kind = [i for i, (target, _) in enumerate(tried) if (target.memory, target.scorer) == (memory, scorer)]
            best += [min(kind, key=cost.__getitem__)] if kind else []
        lowest_cost = min((cost[i] for i in best), default=0.0)
        # The cheapest of those that are as good.
        chosen += [tried[i] for i in best if cost[i] <= lowest_cost + SAME_LOSS][:1]
        of_scorers += [tried[i] for i in best]
    return _Found(chosen, of_scorers, len(tried))


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


def _with_first(shape: Shape, candidate: _Candidate, lowest: float) -> _Candidate | None:
    """The same with the model's first layers full too; `None` if they are, or if they cost too much."""
    target, first = candidate.target, shape.compressible[:FIRST_LAYERS]
    full_layers = tuple(sorted({*target.full_layers, *first}))
    if len(full_layers) in (len(target.full_layers), len(shape.compressible)):
        return None
    ratio = ratio_for(target.memory, len(shape.compressible), len(full_layers))
    if ratio < lowest:
        return None
    name = f"{candidate.order}, first layers"
    return _Candidate(target._replace(full_layers=full_layers, keep_ratio=ratio), name)


def _costs(
    model: Any,
    shape: Shape,
    scorers: Scorers,
    cases: Sequence[Case],
    candidates: Sequence[_Candidate],
    progress: Progress,
) -> list[float]:
    """Mean loss of the cases, half of which are hidden, under each candidate."""
    if not candidates:
        return []
    choices = [choice_of(shape, each.target) for each in candidates]
    costs: list[float] = losses_of_cases(model, shape, scorers, cases, choices, progress).loss.mean(0).tolist()
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
    progress.part("asking what was held out", len(cases), "questions")
    choices = [choice_of(shape, target) for _, target in named]
    lost = losses_of_cases(model, shape, scorers, cases, choices, progress)
    hidden = torch.tensor([case.hidden for case in cases])

    def both(values: torch.Tensor) -> tuple[float, float]:
        means = (values[hidden].mean(), values[~hidden].mean())
        return round(means[0].item(), 4), round(means[1].item(), 4)

    return tuple(
        Outcome(name, *target, both(lost.loss[:, i]), both(lost.exact[:, i].float()))
        for i, (name, target) in enumerate(named)
    )
