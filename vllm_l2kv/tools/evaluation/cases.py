"""The prompts that a task gives to the engine, and the answers that it gets back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The answer of the engine to a case.

    Attributes:
        text: Decoded text.
        losses: For each generated token, the negative log-probability of the model in nats, before any sampling.
        hits: For each generated token, whether it was the most likely one.
        memory: Memory that the request held at its end, divided by what it would have held uncompressed.
    """

    text: str
    losses: tuple[float, ...]
    hits: tuple[bool, ...]
    memory: float = 1.0


@dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        prompt: Token ids.
        num_tokens: Number of tokens to generate.
        score: Computes metrics of an answer: names to numbers or lists of numbers.
        about: Fields of the case in its rows, such as its length.
        forced: Token ids to generate instead of the model's choice; empty for the model's choice.
        num_document_tokens: Tokens of the prompt before its question. They are compressed alone if the question is
            hidden from the compression. `None` if the prompt has no such part.
    """

    prompt: list[int]
    num_tokens: int
    score: Callable[[Answer], Mapping[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)
    forced: tuple[int, ...] = ()
    num_document_tokens: int | None = None
