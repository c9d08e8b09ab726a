"""All measurements of a profile, on texts and questions.

Shapes: L layers, H KV heads.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_l2kv.cli_types import counted
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
    """Means over texts or questions, fp32 on the CPU; NaN for layers that never compress.

    Attributes:
        retrieval: `[L, H]`, attention from answers to the facts that they need.
        repetition: `[L, H]`, share of a head's rows kept by a budget that all heads share, if rows are kept by the
            attention of a repetition.
        loss: `[L]`, nats per token that answers lose if a layer keeps only the protected rows.
        head_loss: `[L, H]`, the same for a KV head.
        norms: Results of `norms.measure`, `[L, H]` or `[R, L, H]`.
        whole_loss: Loss of answers with all rows, in nats per token.
        num_answered: Number of questions that the model answers with all rows.
        num_questions: Number of questions asked.
        images: Results of `images.image_norms`; empty without pictures.
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
        """The measurements by which layers and heads are ordered, by name."""
        return {name: getattr(self, name) for name in ("retrieval", "repetition", "loss", "head_loss")}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All measurements by their names in a profile."""
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
    """Reads each text twice in a row, and asks the questions about the texts.

    Args:
        model: Model of `transformers`.
        tokenizer: The model's tokenizer.
        shape: Shape of the model's KV cache.
        samples: Texts, some of them with questions.
        progress: Counts texts and questions.
        collect: Called with the rows of each text in each layer.

    Raises:
        ValueError: No text has a question, or the layout of the model is not supported.
    """
    if not any(sample.questions for sample in samples):
        raise ValueError("No text has a question; raise --samples or --tokens.")
    between = encode(tokenizer, REPEAT)[len(encode(tokenizer, "")) :]
    shares, of_norms = [], []
    progress.begin(f"reading {counted(len(samples), 'text')}")
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
    """Measurements of one text, layer by layer."""

    norms: list[dict[str, torch.Tensor]] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)

    def look(self, seen: Seen) -> None:
        self.norms.append(norms.measure(seen))


def _ask(model: Any, shape: Shape, samples: Sequence[Sample], progress: Progress) -> list[Answers]:
    with_questions = [sample for sample in samples if sample.questions]
    num_questions = sum(len(sample.questions) for sample in with_questions)
    progress.begin(f"asking {counted(num_questions, 'question')}")
    found: list[Answers] = []
    for sample in with_questions:
        context = read(model, sample.token_ids)
        for question in sample.questions:
            progress.part(f"asking question {len(found) + 1} of {num_questions}, without each layer and head")
            found.append(answers(model, shape, context, question))
            progress.reached(len(found) / num_questions)
    return found


def mean(values: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean of tensors of the same shape."""
    return torch.stack(list(values)).mean(0)


def spread(values: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Expands values of the layers that may compress, `[..., l, H]`, to all layers, `[..., L, H]`, with NaN."""
    among = values.new_full((*values.shape[:-2], shape.num_layers, values.shape[-1]), torch.nan)
    among[..., list(shape.compressible), :] = values
    return among
