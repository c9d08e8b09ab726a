"""When two bf16 runs of one request agree: token by token until logits too close to tell let them part."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One generated token and the logits of the likeliest ones."""

    token: int
    logits: dict[int, float]


def steps_of(output: Any) -> list[Step]:
    """Of an output whose engine runs with `logprobs_mode="raw_logits"`."""
    completion = output.outputs[0]
    return [
        Step(token, {other: entry.logprob for other, entry in entries.items()})
        for token, entries in zip(completion.token_ids, completion.logprobs, strict=True)
    ]


class Agreement(NamedTuple):
    """How far two runs agree.

    Attributes:
        num_equal: Tokens before the first that differs.
        drift: Largest difference between the runs' logits of one token, at steps with the same past.
        gap: Where they part, the distance between the two candidates' logits, in the run in which it is larger.
    """

    num_equal: int
    drift: float
    gap: float


def agreement(one: Sequence[Step], other: Sequence[Step]) -> Agreement:
    drift = 0.0
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        shared = a.logits.keys() & b.logits.keys()
        assert {a.token, b.token} <= shared, f"step {i}: the runs do not even know each other's token"
        drift = max(drift, *(abs(a.logits[token] - b.logits[token]) for token in shared))
        if a.token != b.token:
            return Agreement(i, drift, max(abs(run.logits[a.token] - run.logits[b.token]) for run in (a, b)))
    return Agreement(len(one), drift, 0.0)
