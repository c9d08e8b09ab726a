"""Classes of KV heads: layers of which some heads compact and others never do, against the reference, in fp32."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from engine import Engine, bare_rule, draw, keep, running, tokens_of
from reference import check_numbers, expected_compactions
from scored import TELLING_SCORERS, ScoredReference

INTERVALS = (100, 16)
NUM_TOKENS = 12
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4}
"""Two query heads for each KV head, in four layers."""

Rule = Mapping[str, Any]
Case = tuple[Sequence[int], Rule, list[int]]
"""A prompt, what is asked, and the reference's answer."""

SPREAD = ((), {0: (1,), 1: (0, 3), 3: (2,)})
"""In one layer both classes are in a row, in one layer neither; one has no full head."""
MANY = ((0,), {1: (1,), 2: (0, 1, 2, 3), 3: (0, 1)})
"""Two layers of full heads alone, one of them by its heads; with the others they are more than those that compact."""
HALF = ((), dict.fromkeys(range(4), (1, 2)))
"""Blocks of both classes are alike, so vLLM keeps its own layout."""


class Heads(NamedTuple):
    """An engine with full heads, and the reference."""

    engine: Engine
    reference: ScoredReference

    def cases(self, asked: Sequence[tuple[int, Rule]], seed: int = 0) -> list[Case]:
        """Prompts of so many tokens, none of them twice, under which rounding decides nothing."""
        chance, found = random.Random(seed), []
        for length, rule in asked:
            answer = None
            while answer is None:
                prompt = draw(chance, length)
                answer = self.answer(prompt, rule)
            found.append((prompt, rule, answer))
        return found

    def answer(self, prompt: Sequence[int], rule: Rule) -> list[int] | None:
        rule = {"num_tokens": NUM_TOKENS, "intervals": INTERVALS, **rule}
        return self.reference.telling_answer(prompt, **rule)

    def check(self, cases: Sequence[Case]) -> list[Any]:
        """All in one batch; returns the outputs."""
        params = [keep(**{"ratio": 1, **rule}) for _, rule, _ in cases]
        outputs = self.engine.generate([prompt for prompt, _, _ in cases], params)
        for (prompt, rule, answer), output in zip(cases, outputs, strict=True):
            assert tokens_of(output) == answer, f"{len(prompt)} tokens, {rule}"
            check_numbers(output, intervals=INTERVALS, **of_counts(rule))
        return outputs


def of_counts(rule: Rule) -> dict[str, Any]:
    """What of a rule decides how many rows are kept."""
    return {name: value for name, value in rule.items() if name not in ("scorer", "num_tokens")}


SLOW_ONES = [pytest.param(each, id=name, marks=pytest.mark.slow) for name, each in (("many", MANY), ("half", HALF))]


@pytest.fixture(scope="module", params=[pytest.param(SPREAD, id="spread"), *SLOW_ONES])
def module_heads(request, tiny_model):
    model, (full_layers, full_heads) = tiny_model("llama", **SHAPE), request.param
    intervals = {"prompt_interval": INTERVALS[0], "answer_interval": INTERVALS[1]}
    with running(model, **bare_rule(full_layers=full_layers, full_heads=full_heads, **intervals)) as engine:
        yield Heads(engine, ScoredReference(model, len(full_layers), full_heads=full_heads))


@pytest.fixture
def heads(module_heads):
    with module_heads.engine.emptied():
        yield module_heads


ASKED = [
    *((length, {"ratio": ratio}) for length in (33, 97, 700) for ratio in ("1", "0.5", "0.2")),
    (300, {"ratio": "0.3", "first": 4, "last": 32}),
    (7, {"budget": 20, "num_tokens": 60}),
    (600, {"budget": 64, "num_tokens": 40}),
    (450, {"budget": 150, "ratio": "0.25", "first": 4, "last": 16}),
    (300, {"ratio": "0.4", "document": 200}),
    (650, {"ratio": "0.5", "document": 333, "budget": 70, "first": 4}),
    *((200 + i, {"ratio": "0.4", "scorer": scorer}) for i, scorer in enumerate(TELLING_SCORERS)),
    (350, {"budget": 90, "scorer": "keydiff"}),
]


def test_all_rules_in_one_batch_and_again_on_what_that_left_in_the_prefix_cache(heads):
    cases = heads.cases(ASKED)
    assert not any(output.num_cached_tokens for output in heads.check(cases))
    whole = [heads.answer(prompt, {"num_tokens": len(answer)}) for prompt, _, answer in cases]
    assert sum(answer != other for (_, _, answer), other in zip(cases, whole, strict=True)) > 8
    for (prompt, rule, _), output in zip(cases, heads.check(cases), strict=True):
        n = len(prompt)
        in_prompt = list(expected_compactions(n, n - 1, intervals=INTERVALS, **of_counts(rule)))
        if in_prompt:
            assert output.num_cached_tokens == in_prompt[-1], rule
        else:
            assert output.num_cached_tokens or n <= 33, rule
