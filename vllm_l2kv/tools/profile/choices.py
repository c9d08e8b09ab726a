"""Choices of how many rows each KV head keeps, and their cost in answers to calibration questions.

A question is asked in two ways. Seen: the prompt is compressed after the question, so the first token of the answer is
computed from the whole cache. Hidden: the text is compressed alone, and the question comes after it.

Shapes: L layers of the model, H KV heads, T tokens of a context, N cases, C choices.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from vllm_l2kv.kernels.reference import ranked
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import num_keep
from vllm_l2kv.profile import Ranking, Shape
from vllm_l2kv.scorers import Rows, Scorers
from vllm_l2kv.token_groups import pool_scores
from vllm_l2kv.tools.profile.calibration import Sample
from vllm_l2kv.tools.profile.masked import Context, Losses, answer_losses, read
from vllm_l2kv.tools.progress import Progress


class Choice(NamedTuple):
    """How many rows each head keeps, and which.

    Attributes:
        ranking: By what heads choose rows.
        keep_ratios: For each layer, the ratios of its heads; heads with ratio 1 are full.
    """

    ranking: Ranking
    keep_ratios: tuple[tuple[float, ...], ...]


class Case(NamedTuple):
    """A question, asked in one of the two ways.

    Attributes:
        kind: Kind of the text.
        hidden: Whether the text is compressed before the question is seen.
        context: Token ids that are compressed.
        after: Token ids that follow the context.
        num_predicted: Number of last tokens of `after` that are the answer.
    """

    kind: str
    hidden: bool
    context: list[int]
    after: list[int]
    num_predicted: int


class Ranked(NamedTuple):
    """The rows of a context and their ranks.

    Attributes:
        context: The rows.
        places: Ranking to ranks, `[L, H, T]` int32 on the model's device; 0 for the row that a head keeps first.
    """

    context: Context
    places: Mapping[Ranking, torch.Tensor]


def answerable(
    model: Any,
    shape: Shape,
    samples: Sequence[Iterable[Sample]],
    num: int,
    progress: Progress,
    purpose: str = "for the search",
) -> list[list[Case]]:
    """Up to `num` questions that the model answers from its whole cache, each as two cases: hidden, then seen.

    There are equally many about each kind of text, and kinds alternate. A question that the model cannot answer would
    not show what eviction costs. If the model answers too few of a kind, those with the lowest loss are added.

    Args:
        model: Model of `transformers`.
        shape: Shape of the model's KV cache.
        samples: Texts of each kind, taken only as needed.
        num: Number of questions.
        progress: Counts questions.
        purpose: What the questions are for, as words of the progress.
    """
    share = -(-num // len(samples))
    progress.part(f"finding questions {purpose} that the model answers", share * len(samples), "found")
    of_kinds = [_answerable(model, shape, of_kind, share, progress) for of_kind in samples]
    return [cases for turn in zip_longest(*of_kinds) for cases in turn if cases is not None][:num]


def _answerable(model: Any, shape: Shape, samples: Iterable[Sample], num: int, progress: Progress) -> list[list[Case]]:
    """See `answerable`; for texts of one kind."""
    found: list[tuple[bool, float, list[Case]]] = []
    num_right = 0
    for sample in samples:
        context = read(model, sample.token_ids)
        keep = torch.ones(1, shape.num_layers, shape.num_kv_heads, context.num_tokens, dtype=torch.bool)
        for question, answer, _ in sample.questions:
            hidden = Case(sample.kind, True, sample.token_ids, question + answer, len(answer))
            seen = Case(sample.kind, False, sample.token_ids + question, answer, len(answer) - 1)
            losses = answer_losses(model, context, hidden.after, len(answer), keep)
            is_right = bool(losses.exact.item())
            found.append((not is_right, losses.loss.item(), [hidden, seen]))
            num_right += is_right
            progress.advance(int(is_right and num_right <= num))
        if num_right >= num:
            break
    right = [cases for wrong, _, cases in found if not wrong]
    wrong = [cases for wrong, _, cases in sorted(found, key=lambda each: each[:2]) if wrong]
    return [*right, *wrong][:num]


def kinds_of(questions: Iterable[Sequence[Case]]) -> dict[str, int]:
    """Kinds of texts to their numbers of questions."""
    return dict(Counter(cases[0].kind for cases in questions))


def rank(model: Any, shape: Shape, scorers: Scorers, rankings: Iterable[Ranking], case: Case) -> Ranked:
    """Reads the context of a case and ranks its rows.

    Args:
        model: Model of `transformers`.
        shape: Shape of the model's KV cache.
        scorers: Scorers bound to all heads of the compressible layers.
        rankings: The rankings to use.
        case: The case whose context is read.
    """
    context = read(model, case.context)
    protect = CompressionParams.protect_first, CompressionParams.protect_last
    of_rankings: dict[Ranking, list[torch.Tensor]] = {ranking: [] for ranking in rankings}
    names = {ranking.scorer for ranking in of_rankings}
    for i, layer in enumerate(shape.compressible):
        rows = Rows(context.keys[layer].to(model.device), context.values[layer].to(model.device), i)
        scores = {name: scorers[name].score(rows) for name in names}
        for ranking, of_layers in of_rankings.items():
            of_layers.append(pool_scores(scores[ranking.scorer], ranking.granularity))
    places = {}
    for ranking, of_layers in of_rankings.items():
        # All layers in one sort, since sorts of a few thousand numbers take as long as they take to launch.
        order = ranked(torch.cat(of_layers), *protect).argsort(-1).int()
        of_model = order.new_zeros(shape.num_layers, shape.num_kv_heads, context.num_tokens)
        of_model[list(shape.compressible)] = order.view(-1, shape.num_kv_heads, context.num_tokens)
        places[ranking] = of_model
    return Ranked(context, places)


def losses(model: Any, case: Case, rows: Ranked, choices: Sequence[Choice]) -> Losses:
    """Losses of the answer of a case under each choice: `[C]`."""
    ratios = torch.tensor([choice.keep_ratios for choice in choices], dtype=torch.float64)
    distinct, which = ratios.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    counts = [num_keep(rows.context.num_tokens, CompressionParams(ratio)) for ratio in distinct.tolist()]
    bounds = torch.tensor(counts)[which].to(model.device)
    kept = [rows.places[choice.ranking] < bounds[i, :, :, None] for i, choice in enumerate(choices)]
    return answer_losses(model, rows.context, case.after, case.num_predicted, torch.stack(kept))


def losses_of_cases(
    model: Any, shape: Shape, scorers: Scorers, cases: Sequence[Case], choices: Sequence[Choice], progress: Progress
) -> Losses:
    """Losses of every case under every choice: `[N, C]`. A context of several cases is read once."""
    rankings = sorted({choice.ranking for choice in choices})
    of_context: dict[tuple[int, ...], list[int]] = {}
    for i, case in enumerate(cases):
        of_context.setdefault(tuple(case.context), []).append(i)
    found: dict[int, Losses] = {}
    for same in of_context.values():
        rows = rank(model, shape, scorers, rankings, cases[same[0]])
        for i in same:
            found[i] = losses(model, cases[i], rows, choices)
            progress.advance(1)
    of_cases = [found[i] for i in range(len(cases))]
    return Losses(torch.stack([each.loss for each in of_cases]), torch.stack([each.exact for each in of_cases]))
