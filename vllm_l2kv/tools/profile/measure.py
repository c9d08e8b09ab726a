"""All that a profile says of a model, measured on texts and questions.

Shapes: L layers, H KV heads.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_l2kv.profile import Shape
from vllm_l2kv.tools.evaluation.texts import encode
from vllm_l2kv.tools.profile import norms
from vllm_l2kv.tools.profile.calibration import Sample
from vllm_l2kv.tools.profile.masked import read
from vllm_l2kv.tools.profile.observe import Seen
from vllm_l2kv.tools.profile.ranks import REPEAT, Answers, Rows, answers, pooled_shares, repetition
from vllm_l2kv.tools.progress import Progress


@dataclass(frozen=True)
class Measured:
    """Means over texts or questions, fp32 on the CPU; layers that never compress are NaN.

    Attributes:
        retrieval: `[L, H]`, attention from answers to the facts that they need.
        repetition: `[L, H]`, share of its rows that a head keeps of a pooled budget, by what a repetition looks at.
        loss: `[L]`, nats a token that answers lose when a layer keeps protected rows alone.
        head_loss: `[L, H]`, the same for a KV head.
        norms: Of `norms.measure`, `[L, H]` or `[R, L, H]`.
        whole_loss: Nats a token of answers with all rows.
        num_answered: Questions that the model answers with all rows.
        num_questions: Of those that were asked.
        images: Of `images.image_norms`; empty where no picture was shown.
    """

    retrieval: torch.Tensor
    repetition: torch.Tensor
    loss: torch.Tensor
    head_loss: torch.Tensor
    norms: dict[str, torch.Tensor]
    whole_loss: float
    num_answered: int
    num_questions: int
    images: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, torch.Tensor]:
        """What layers and heads are ordered by, by name."""
        return {name: getattr(self, name) for name in ("retrieval", "repetition", "loss", "head_loss")}

    def tensors(self) -> dict[str, torch.Tensor]:
        """As a profile stores them."""
        groups = {"norms": self.norms, "images": self.images}
        return self.ranks | {f"{group}.{name}": groups[group][name] for group in groups for name in groups[group]}


def measure(
    model: Any,
    tokenizer: Any,
    shape: Shape,
    samples: Sequence[Sample],
    progress: Progress,
    collect: Callable[[Rows], None] = lambda _rows: None,
) -> Measured:
    """Reads texts, each of them twice in a row, and asks the questions about them.

    Args:
        model: Of `transformers`.
        tokenizer: Its own.
        shape: Of its cache.
        samples: Texts, some with questions.
        progress: Counts texts and questions.
        collect: Given the rows of each text in each layer.

    Raises:
        ValueError: No text has a question, or the model is of another layout.
    """
    if not any(sample.questions for sample in samples):
        raise ValueError("No text has a question: more texts are needed.")
    between = encode(tokenizer, REPEAT)[len(encode(tokenizer, "")) :]
    shares, of_norms = [], []
    progress.begin(f"reading {len(samples)} texts")
    for number, sample in enumerate(samples, start=1):
        progress.part(f"reading text {number} of {len(samples)} ({sample.kind})")
        found = _Text()
        for rows in repetition(model, sample.token_ids, between, found.look):
            collect(rows)
            found.scores.append(rows.scores)
        shares.append(pooled_shares(torch.stack([scores.cpu() for scores in found.scores])))
        of_norms.append({name: torch.stack([layer[name] for layer in found.norms], -2) for name in found.norms[0]})
        progress.reached(number / len(samples))
    asked = _ask(model, shape, samples, progress)
    return Measured(
        retrieval=mean(each.retrieval for each in asked),
        repetition=spread(mean(shares), shape),
        loss=mean(each.loss for each in asked),
        head_loss=mean(each.head_loss for each in asked),
        norms={name: spread(mean(each[name] for each in of_norms), shape) for name in of_norms[0]},
        whole_loss=sum(each.whole_loss for each in asked) / len(asked),
        num_answered=sum(each.answered for each in asked),
        num_questions=len(asked),
    )


@dataclass
class _Text:
    """What one text says, a layer after the other."""

    norms: list[dict[str, torch.Tensor]] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)

    def look(self, seen: Seen) -> None:
        self.norms.append(norms.measure(seen))


def _ask(model: Any, shape: Shape, samples: Sequence[Sample], progress: Progress) -> list[Answers]:
    with_questions = [sample for sample in samples if sample.questions]
    num_questions = sum(len(sample.questions) for sample in with_questions)
    progress.begin(f"asking {num_questions} questions")
    found: list[Answers] = []
    for sample in with_questions:
        context = read(model, sample.token_ids)
        for question in sample.questions:
            progress.part(f"asking question {len(found) + 1} of {num_questions}, without each layer and head")
            found.append(answers(model, shape, context, question))
            progress.reached(len(found) / num_questions)
    return found


def mean(values: Iterable[torch.Tensor]) -> torch.Tensor:
    """Of tensors of one shape."""
    return torch.stack(list(values)).mean(0)


def spread(values: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Values of layers that may compress, `[..., l, H]`, among all layers: `[..., L, H]`."""
    among = values.new_full((*values.shape[:-2], shape.num_layers, values.shape[-1]), torch.nan)
    among[..., list(shape.compressible), :] = values
    return among
