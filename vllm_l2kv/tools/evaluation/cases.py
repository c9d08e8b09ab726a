"""What a task hands to the engine, and what comes back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the engine generated.

    Attributes:
        text: Decoded.
        losses: Of each generated token, minus its log-probability in nats, as the model has it before any sampling.
        hits: Whether the token was the likeliest.
        memory: Of the whole cache that the request held at its end, over what it would have held uncompressed.
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
        num_tokens: Tokens to generate.
        score: Turns an answer into numbers, or lists of numbers, by name.
        about: What its rows say of it, such as its length.
        forced: Token ids to generate in place of what the model chooses; empty for the model's own.
        num_document_tokens: Tokens of the prompt before its question, which are compressed alone where the question is
            hidden from the compression; `None` if there is no such place.
    """

    prompt: list[int]
    num_tokens: int
    score: Callable[[Answer], Mapping[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)
    forced: tuple[int, ...] = ()
    num_document_tokens: int | None = None
