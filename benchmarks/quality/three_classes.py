"""Three classes of layers compared with two at the same memory of the whole cache: losses of held-out answers.

python -m benchmarks.quality.three_classes PROFILE MODEL OUT.jsonl [--questions N] [--device cpu]

Two classes: some layers full, the others at one ratio. Three: some full, some at a higher ratio, the rest at a lower
one. Rows that a class evicts are masked, as in `vllm-l2kv profile`. Candidates of both kinds come from the same orders
of layers. For each scorer the best candidate on two thirds of the questions is evaluated on the last third.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.speed.rows import append, where
from vllm_l2kv.profile import Profile, Shape, local_folder
from vllm_l2kv.scorers import Heads, Weights, bind
from vllm_l2kv.tools.profile.calibration import asked_samples
from vllm_l2kv.tools.profile.choices import Choice, answerable, losses_of_cases
from vllm_l2kv.tools.profile.model import load
from vllm_l2kv.tools.progress import Progress

MEMORIES = (0.5, 0.25)
SCORERS = ("l2", "learned")
LOWEST = 0.05
"""Ratio at which the protected rows of a text are all that is kept."""
SEED = 7
"""Seed of the texts; the profile's own texts have another."""
NUM_TEXTS, NUM_TOKENS = 120, 1536
SAMPLES = 2000
"""Number of bootstrap samples."""


class Layers(NamedTuple):
    """Ratios of the classes, and the layers of all classes but the last, which has the remaining layers."""

    ratios: tuple[float, ...]
    classes: tuple[tuple[int, ...], ...]

    def choice(self, shape: Shape, scorer: str) -> Choice:
        """Returns the choice with a scorer."""
        ratios = [self.ratios[-1]] * shape.num_layers
        for ratio, layers in zip(self.ratios, self.classes, strict=False):
            for layer in layers:
                ratios[layer] = ratio
        return Choice(scorer, tuple((ratio,) * shape.num_kv_heads for ratio in ratios))


def main() -> None:
    """Measures and writes two rows for each memory and scorer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=int, default=72)
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    profile, folder = Profile.read(args.profile), str(local_folder(args.model))
    model, shape = load(folder, args.device), profile.shape
    drawn = asked_samples(AutoTokenizer.from_pretrained(folder), args.tokens, NUM_TEXTS, SEED)
    heads = Heads.of_rank(shape.compressible, shape.num_kv_heads, 0, 1, model.device)
    scorers = bind(heads, Weights(profile.weights(), profile.rope))
    with Progress(sys.stderr) as progress:
        progress.begin("asking questions")
        questions = answerable(model, shape, drawn, args.questions, progress)
        cases = [case for of_question in questions for case in of_question]
        for memory in MEMORIES:
            tried = {2: list(two(profile, memory)), 3: list(three(profile, memory))}
            both = [*tried[2], *tried[3]]
            for scorer in SCORERS:
                progress.part(f"memory {memory}, {scorer}, {len(both)} settings", len(cases), "questions asked")
                choices = [layers.choice(shape, scorer) for layers in both]
                found = losses_of_cases(model, shape, scorers, cases, choices, progress)
                report(args.out, profile, memory, scorer, tried, found.loss, found.exact.float())


def orders(profile: Profile) -> list[tuple[int, ...]]:
    """Returns the profile's order of layers, and the orders by each of its measurements."""
    measures = profile.measures()
    by = [measures["retrieval"].amax(-1), measures["repetition"].amax(-1), measures["loss"]]
    layers = profile.shape.compressible
    found = [tuple(sorted(layers, key=lambda layer: -values[layer].item())) for values in by]
    return list(dict.fromkeys([profile.layer_order, *found]))


def two(profile: Profile, memory: float) -> Iterator[Layers]:
    """Yields every number of full layers of each order."""
    num_layers = len(profile.shape.compressible)
    for order in orders(profile):
        for full in range(num_layers):
            ratio = (memory * num_layers - full) / (num_layers - full)
            if ratio >= LOWEST:
                yield Layers((1.0, ratio), (order[:full],))


def three(profile: Profile, memory: float) -> Iterator[Layers]:
    """Yields numbers of full and of middle layers of each order, with the others at one of two ratios."""
    num_layers = len(profile.shape.compressible)
    for order in orders(profile):
        for lowest in (LOWEST, 2 * LOWEST):
            for full in range(0, num_layers, 2):
                for middle in (2, 4, 6, 9, 12, 16):
                    rest = num_layers - full - middle
                    ratio = (memory * num_layers - full - lowest * rest) / middle
                    if rest > 0 and 1.5 * lowest <= ratio <= 0.8:
                        classes = order[:full], order[full : full + middle]
                        yield Layers((1.0, ratio, lowest), classes)


def report(
    out: Path,
    profile: Profile,
    memory: float,
    scorer: str,
    tried: dict[int, list[Layers]],
    loss: torch.Tensor,
    exact: torch.Tensor,
) -> None:
    """Writes a row for each number of classes.

    Args:
        out: The file.
        profile: The model's profile.
        memory: Memory of the settings.
        scorer: Scorer of the settings.
        tried: Settings by their number of classes, in the order of columns.
        loss: Losses `[cases, settings]`; cases alternate between hidden and seen.
        exact: Exact answers, in the same shape.
    """
    held_out = torch.tensor([(i // 2) % 3 == 0 for i in range(len(loss))])
    best, first = {}, 0
    for number, settings in tried.items():
        best[number] = first + int(loss[~held_out, first : first + len(settings)].mean(0).argmin())
        first += len(settings)
    both = [*tried[2], *tried[3]]
    for number, i in best.items():
        append(
            out,
            {
                "model": profile.model,
                "memory": memory,
                "scorer": scorer,
                "classes": number,
                "ratios": [round(ratio, 4) for ratio in both[i].ratios],
                "layers": [sorted(layers) for layers in both[i].classes],
                "num_tried": len(tried[number]),
                "num_questions": int(held_out.sum()) // 2,
                **means(loss[held_out, i], exact[held_out, i]),
                "less_loss_than_two": interval(loss[held_out, best[2]] - loss[held_out, i]),
                "more_exact_than_two": interval(exact[held_out, i] - exact[held_out, best[2]]),
                **where(),
            },
        )


def means(loss: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Returns the means of the held-out cases `[n]`, which alternate between hidden and seen."""
    named = {"loss_hidden": loss[::2], "loss_seen": loss[1::2], "exact_hidden": exact[::2], "exact_seen": exact[1::2]}
    return {name: round(values.mean().item(), 4) for name, values in named.items()}


def interval(differences: torch.Tensor) -> Sequence[float]:
    """Returns the mean of paired differences `[n]`, alternately hidden and seen, and its bootstrap 95 % interval."""
    of_questions = differences.view(-1, 2).mean(1)
    chance = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(of_questions), (SAMPLES, len(of_questions)), generator=chance)
    low, high = of_questions[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(value, 4) for value in (of_questions.mean().item(), low, high)]


if __name__ == "__main__":
    main()
