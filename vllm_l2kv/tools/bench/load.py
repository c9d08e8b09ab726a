"""The requests of a load test: how many, how long and when. The same seed gives the same lengths and arrivals."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice, takewhile
from random import Random
from typing import NamedTuple

from vllm_l2kv.cli_types import number, positive

FORMS = "N, LOW:HIGH (uniform) or lognormal:MEDIAN:SIGMA:HIGH (cut at HIGH)"


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts within `low..high`: uniform, or log-normal if it has a median."""

    low: int
    high: int
    median: int | None = None
    sigma: float = 0.0

    def draw(self, random: Random) -> int:
        """Draws one count; values outside the bounds are set to the bound."""
        if self.median is None:
            return random.randint(self.low, self.high)
        drawn = round(random.lognormvariate(math.log(self.median), self.sigma))
        return min(max(drawn, self.low), self.high)

    def __str__(self) -> str:
        if self.median is not None:
            return f"lognormal:{self.median}:{self.sigma:g}:{self.high}"
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True)
class Load:
    """The requests of a round.

    Args:
        prompt_tokens: Lengths of prompts.
        output_tokens: Lengths of answers.
        shared_prefix: Share of each prompt that all prompts of a round share, in [0, 1).
        seed: Seed of lengths, arrivals and prompts.
        rate: Requests per second, with Poisson arrivals; `None` for clients that wait for their answers.
        concurrency: Number of these clients.
        num_requests: Number of requests; `None` to use `duration_s`.
        duration_s: Seconds after which no more requests are sent; `None` to use `num_requests`.
    """

    prompt_tokens: Lengths
    output_tokens: Lengths
    shared_prefix: float = 0.0
    seed: int = 0
    rate: float | None = None
    concurrency: int = 1
    num_requests: int | None = None
    duration_s: float | None = None


class Planned(NamedTuple):
    """One request: its number in the round, its planned time in seconds, and its lengths in tokens."""

    number: int
    due_s: float
    num_prompt_tokens: int
    num_output_tokens: int


def planned(load: Load) -> Iterator[Planned]:
    """The requests of a round; infinitely many for clients with `duration_s`, since their number is not known."""
    lengths, gaps = Random(f"{load.seed} lengths"), Random(f"{load.seed} arrivals")
    requests = _endless(load, lengths, gaps)
    if load.num_requests is not None:
        return islice(requests, load.num_requests)
    if load.rate is not None and load.duration_s is not None:
        duration_s = load.duration_s
        return takewhile(lambda request: request.due_s <= duration_s, requests)
    return requests


def _endless(load: Load, lengths: Random, gaps: Random) -> Iterator[Planned]:
    due_s = 0.0
    for i in count():
        if load.rate is not None:
            due_s += gaps.expovariate(load.rate)
        yield Planned(i, due_s, load.prompt_tokens.draw(lengths), load.output_tokens.draw(lengths))


def lengths(minimum: int) -> Callable[[str], Lengths]:
    """A parser of `Lengths` for an option.

    Args:
        minimum: Smallest allowed count.
    """

    def parse(text: str) -> Lengths:
        name, *rest = text.split(":")
        if name == "lognormal" and len(rest) == 3:
            median, sigma, high = positive(rest[0]), positive_number(rest[1]), positive(rest[2])
            found = Lengths(minimum, high, median, sigma)
        elif len(rest) <= 1:
            low = positive(name)
            found = Lengths(low, positive(rest[0]) if rest else low)
        else:
            raise ArgumentTypeError(f"lengths must be {FORMS}, got {text!r}.")
        if not minimum <= found.low <= found.high:
            raise ArgumentTypeError(f"lengths must satisfy {minimum} <= LOW <= HIGH, got {text!r}.")
        return found

    return parse


def positive_number(text: str) -> float:
    """A number above 0.

    Raises:
        ArgumentTypeError: The text is not a finite number above 0.
    """
    value = number(text)
    if isinstance(value, str) or not 0 < value < math.inf:
        raise ArgumentTypeError(f"X must be a number with 0 < X, got {text!r}.")
    return float(value)


def share(text: str) -> float:
    """A share in [0, 1).

    Raises:
        ArgumentTypeError: The text is not a number in [0, 1).
    """
    value = number(text)
    if isinstance(value, str) or not 0 <= value < 1:
        raise ArgumentTypeError(f"X must be a number with 0 <= X < 1, got {text!r}.")
    return float(value)
