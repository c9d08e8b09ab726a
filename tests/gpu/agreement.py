"""Agreement of two runs of one request in bf16: equal tokens until two logits are too close to decide."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from engine import keep
from reference import check_numbers


class Step(NamedTuple):
    """One generated token and the logits of the most likely ones."""

    token: int
    logits: dict[int, float]


def steps_of(output: Any) -> list[Step]:
    """Returns the steps of an output whose engine runs with `logprobs_mode="raw_logits"`."""
    completion = output.outputs[0]
    return [
        Step(token, {other: entry.logprob for other, entry in entries.items()})
        for token, entries in zip(completion.token_ids, completion.logprobs, strict=True)
    ]


def tokens_of(steps: Sequence[Step]) -> list[int]:
    return [step.token for step in steps]


class Agreement(NamedTuple):
    """How far two runs agree.

    Attributes:
        num_equal: Tokens before the first difference.
        differences: Differences between the runs' logits of one token, at all steps with the same past.
        gap: Distance of the two candidates' logits at the first difference; 0 if there is none, infinite if the most
        likely tokens of one run lack the other's token.
        steps: The same distance, in units of bf16's resolution there.
    """

    num_equal: int
    differences: list[float]
    gap: float
    steps: float


def agreement(one: Sequence[Step], other: Sequence[Step]) -> Agreement:
    differences = []
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        shared = a.logits.keys() & b.logits.keys()
        if not {a.token, b.token} <= shared:
            return Agreement(i, differences, math.inf, math.inf)
        differences += [a.logits[token] - b.logits[token] for token in shared]
        if a.token != b.token:
            gap = max(abs(run.logits[a.token] - run.logits[b.token]) for run in (a, b))
            return Agreement(i, differences, gap, gap / resolution(a.logits[a.token]))
    return Agreement(len(one), differences, 0.0, 0.0)


def resolution(logit: float) -> float:
    """Returns the resolution of bf16 at this number; bf16 keeps eight bits."""
    return 2.0 ** (math.floor(math.log2(abs(logit))) - 7)


def likely_differences(steps: Sequence[Step], logits: torch.Tensor) -> list[float]:
    """Returns the differences of a run's most likely logits from a reference's, `[num_steps, vocabulary]`."""
    return [logit - logits[i, token].item() for i, step in enumerate(steps) for token, logit in step.logits.items()]


def rms(differences: Iterable[float]) -> float:
    values = list(differences)
    return math.sqrt(sum(value * value for value in values) / len(values))


def cases_of(
    text_ids: Sequence[int], lengths: Sequence[int], rules: Sequence[Mapping[str, Any]]
) -> list[tuple[Sequence[int], Mapping[str, Any]]]:
    """Returns a prompt of each length by each rule, with different beginnings; documents end before their prompt."""
    each = enumerate((length, rule) for length in lengths for rule in rules)
    return [(text_ids[9 * i : 9 * i + n], rule) for i, (n, rule) in each if rule.get("document", 0) < n]


def check_rules(
    engine: Any, references: Sequence[Any], cases: Sequence[tuple[Sequence[int], Mapping[str, Any]]], **asked: Any
) -> str:
    """Checks that an engine's logits differ from a reference's no more than bf16 changes the reference's.

    Args:
    engine: An `engine.Engine` with `LOGITS`.
    references: The reference in fp32, and in bf16.
    cases: Prompts with their rules, which may evict nothing.
    asked: `full_layers`, `intervals` and `num_tokens` of all cases, and `images` that are read as a whole.

    Returns:
    The findings, to print.
    """
    num_tokens = asked.pop("num_tokens")
    places = {"intervals": asked["intervals"], "images": asked.get("images", ())}
    params = [keep(**rule, num_tokens=num_tokens, logprobs=20) for _, rule in cases]
    moved, reach, other = [], [], []
    for (prompt, rule), output in zip(cases, engine.generate([prompt for prompt, _ in cases], params), strict=True):
        numbers = check_numbers(output, **rule, **places)
        steps = steps_of(output)
        tokens = tokens_of(steps)
        assert len(tokens) == num_tokens
        right, bf16 = (reference.logits(prompt, tokens, **rule, **asked) for reference in references)
        likely = right.topk(20).indices
        moved += likely_differences(steps, right)
        reach += (right - bf16).gather(1, likely).flatten().tolist()
        if numbers["compactions"]:
            whole = references[0].logits(prompt, tokens, full_layers=asked["full_layers"])
            other += (right - whole).gather(1, likely).flatten().tolist()
    sizes = [f"{rms(differences):.4f}" if differences else "nothing" for differences in (moved, reach, other)]
    found = f"logits differ by {sizes[0]}, bf16 moves them by {sizes[1]}, the rule by {sizes[2]}"
    assert rms(moved) <= 2 * rms(reach), found
    assert not other or rms(other) > 2 * rms(moved), f"what is compared must depend on the rule: {found}"
    return found
