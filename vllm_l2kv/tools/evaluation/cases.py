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
    """

    text: str
    losses: tuple[float, ...]
    hits: tuple[bool, ...]


@dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        prompt: Token ids.
        num_tokens: Tokens to generate.
        score: Turns an answer into numbers, or lists of numbers, by name.
        about: What its rows say of it, such as its length.
        forced: Token ids to generate in place of what the model chooses; empty for the model's own.
    """

    prompt: list[int]
    num_tokens: int
    score: Callable[[Answer], Mapping[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)
    forced: tuple[int, ...] = ()
