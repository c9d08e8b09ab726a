"""Greedy token ids of the real engine equal those of the reference, in fp32."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from engine import bare_rule, greedy, keep, running
from reference import check_numbers, expected_compactions
from scored import TELLING_SCORERS, ScoredReference

from vllm_l2kv.params import ONE_COMPACTION_SCORERS

RATIOS = ("1.0", "0.9", "0.7", "0.5", "0.3", "0.1")
LENGTHS = (1, 2, 31, 33, 200, 449, 1000)
NUM_TOKENS = 8
INTERVALS = (256, 32)
"""Intervals of the tiny engines; engines of the demo model have the defaults."""


class Case(NamedTuple):
    """A request; the fields from `ratio` on are arguments of `engine.keep`."""

    prompt: Sequence[int]
    num_tokens: int = NUM_TOKENS
    ratio: str = "1"
    first: int = 0
    last: int = 0
    budget: int | None = None
    scorer: str = "l2"

    def __str__(self) -> str:
        return f"{len(self.prompt)} tokens, {self._asdict() | {'prompt': None}}"

    @property
    def rule(self) -> dict[str, Any]:
        """The rule as arguments of the reference."""
        return {"ratio": self.ratio, "first": self.first, "last": self.last, "budget": self.budget}


def prompts_of(text_ids: list[int]) -> dict[int, list[int]]:
    # Different beginnings, so that no prompt finds another in the prefix cache.
    return {length: text_ids[7 * i : 7 * i + length] for i, length in enumerate(LENGTHS)}


def no_token_twice(text_ids: list[int]) -> list[int]:
    """Returns tokens without repetition, for engines that compress layer 0.

    Rotation does not change norms, so in layer 0 the keys of a repeated token have equal norms, and fp32 rounding,
    which differs between machines, would decide which one is kept.
    """
    once = list(dict.fromkeys(text_ids))
    assert len(once) > 720
    return once


def ask(engine, cases: Sequence[Case]) -> list[Any]:
    """Returns the outputs of all cases in one batch."""
    params = [keep(case.ratio, *case[3:5], case.num_tokens, case.budget, case.scorer) for case in cases]
    return engine.generate([case.prompt for case in cases], params)


def check(cases: Sequence[Case], outputs: Sequence[Any], answers: Sequence[list[int]], intervals=(2048, 256)) -> None:
    """Compares tokens and numbers of each case with the reference's answer."""
    for case, answer, output in zip(cases, answers, outputs, strict=True):
        assert len(output.outputs[0].token_ids) == case.num_tokens
        assert list(output.outputs[0].token_ids) == answer, case
        check_numbers(output, **case.rule, intervals=intervals)


def check_exact(engine, reference, cases: Sequence[Case], full_layers: Sequence[int]) -> None:
    """Compares all cases, in one batch, with the reference's most likely tokens."""
    outputs = ask(engine, cases)
    answers = [
        reference.greedy(case.prompt, output.outputs[0].token_ids, **case.rule, full_layers=full_layers)
        for case, output in zip(cases, outputs, strict=True)
    ]
    check(cases, outputs, answers)


# --- the demo model


def test_full_layers_0_and_1_all_ratios_in_one_batch(compressing, reference, text_ids):
    cases = [Case(prompt, ratio=ratio) for prompt in prompts_of(text_ids).values() for ratio in RATIOS]
    check_exact(compressing, reference, cases, (0, 1))


@pytest.mark.slow
def test_a_prompt_of_3000_tokens_at_all_ratios(compressing, reference, text_ids):
    cases = [Case(text_ids[49:3049], ratio=ratio) for ratio in RATIOS]
    check_exact(compressing, reference, cases, (0, 1))


def test_no_full_layers_all_ratios_in_one_batch(all_layers, reference, text_ids):
    once = no_token_twice(text_ids)
    prompts = [once[7 * i : 7 * i + length] for i, length in enumerate((1, 33, 449, 700))]
    cases = [Case(prompt, ratio=ratio) for prompt in prompts for ratio in RATIOS]
    check_exact(all_layers, reference, cases, ())


@pytest.mark.parametrize("engine_name", ["compressing", "all_layers"])
def test_protected_tokens_are_kept(engine_name, reference, text_ids, request):
    engine = request.getfixturevalue(engine_name)
    full_layers = {"compressing": (0, 1), "all_layers": ()}[engine_name]
    text_ids = no_token_twice(text_ids)
    prompts = [text_ids[:200], text_ids[7:507]]
    cases = [Case(prompt, NUM_TOKENS, ratio, 4, 32) for prompt, ratio in itertools.product(prompts, ("0.5", "0.1"))]
    # More protected rows than the ratio keeps, and more than the prompt has.
    cases += [Case(text_ids[:200], NUM_TOKENS, "0.1", *protect) for protect in ((100, 50), (0, 60), (300, 0))]
    check_exact(engine, reference, cases, full_layers)


def test_budgets_of_the_demo_model(compressing, reference, text_ids):
    """With the default intervals, inside a prompt and at its end."""
    cases = [
        Case(text_ids[5:2395], budget=40, first=4, last=32),
        Case(text_ids[80:680], budget=200, ratio="0.5"),
        Case(text_ids[90:690], budget=250, ratio="0.25"),
        Case(text_ids[400:500], budget=48),
    ]
    assert [list(points_of(case)) for case in cases] == [[2088, 2390], [600], [600], []]
    check_exact(compressing, reference, cases, (0, 1))


def test_nothing_asked_equals_stock_vllm(compressing, all_layers, stock, text_ids):
    prompts = [prompt for length, prompt in prompts_of(text_ids).items() if length < 1000]
    params = [greedy(NUM_TOKENS)] * len(prompts)
    expected = stock.tokens(prompts, params)
    assert compressing.tokens(prompts, params) == expected
    assert all_layers.tokens(prompts, params) == expected
    for output in compressing.generate(prompts, params):
        assert output.kv_transfer_params is None


# --- budgets of a tiny model: many compactions, long answers


def points_of(case: Case, intervals=(2048, 256)) -> dict[int, int]:
    num_computed = len(case.prompt) + case.num_tokens - 1
    return expected_compactions(len(case.prompt), num_computed, **case.rule, intervals=intervals)


def tiny_cases(text_ids: list[int], full_layers: tuple[int, ...]) -> list[Case]:
    """Returns cases in which no prompt begins another one, and rounding decides nothing; see `scored`."""
    if not full_layers:
        text_ids = no_token_twice(text_ids)
    again = [scorer for scorer in TELLING_SCORERS if scorer not in ONE_COMPACTION_SCORERS]
    scorers = [
        Case(text_ids[120 + i : 620 + i], 40, first=4, last=8, budget=80, scorer=name) for i, name in enumerate(again)
    ]
    if not full_layers:
        # An answer repeats tokens. Their keys differ only in direction here, so scorers by direction do not tie.
        long = [Case(text_ids[:200], 500, budget=96, scorer="keydiff"), Case(text_ids[7:8], 120, budget=40)]
        return [*long, Case(text_ids[9:709], 24, ratio="0.5"), *scorers]
    return [
        Case(text_ids[0:1], 200, budget=40),
        Case(text_ids[7:40], 500, first=4, last=16, budget=64),
        Case(text_ids[14:214], 500, budget=96),
        Case(text_ids[21:221], 60, ratio="0.5", budget=120),
        Case(text_ids[28:477], 120, ratio="0.3", budget=200),
        Case(text_ids[42:491], 80, ratio="0.7", first=4, last=16, budget=100),
        Case(text_ids[49:1049], 60, first=4, last=64, budget=128),
        Case(text_ids[371:3371], 40, last=3, budget=256),
        Case(text_ids[518:3518], 24, ratio="0.1", budget=512),
        Case(text_ids[63:763], 40),
        Case(text_ids[70:770], 40, ratio="0.5", first=4, last=32),
        *scorers,
    ]


class Tiny(NamedTuple):
    """An engine of the tiny model, its requests, and the reference's answers."""

    engine: Any
    cases: list[Case]
    answers: list[list[int]]


@pytest.fixture(scope="module")
def expected(llama, text_ids):
    """Cases and answers, made once for all engines with the same full layers."""
    made = {}

    def expected(full_layers: tuple[int, ...]):
        if full_layers not in made:
            cases, reference = tiny_cases(text_ids, full_layers), ScoredReference(llama, len(full_layers))
            answers = [
                reference.telling_answer(case.prompt, case.num_tokens, case.scorer, **case.rule, intervals=INTERVALS)
                for case in cases
            ]
            assert None not in answers, cases[answers.index(None)]
            made[full_layers] = cases, answers
        return made[full_layers]

    return expected


SLOW_ONES = [pytest.param(param, marks=pytest.mark.slow) for param in (((0,), 2048), ((0, 1), 512))]


@pytest.fixture(scope="module", params=[((0,), 64), *SLOW_ONES, ((), 192)], ids=str)
def tiny(request, llama, expected) -> Tiny:
    """Engines with different full layers and numbers of tokens per step."""
    full_layers, num_batched = request.param
    rule = bare_rule(full_layers=full_layers, prompt_interval=INTERVALS[0], answer_interval=INTERVALS[1])
    with running(llama, max_model_len=4096, max_num_batched_tokens=num_batched, max_num_seqs=20, **rule) as engine:
        yield Tiny(engine, *expected(full_layers))


def test_all_budgets_in_one_batch_and_again_with_the_prefix_cache(tiny):
    outputs = ask(tiny.engine, tiny.cases)
    check(tiny.cases, outputs, tiny.answers, INTERVALS)
    assert not any(output.num_cached_tokens for output in outputs)
    outputs = ask(tiny.engine, tiny.cases)
    check(tiny.cases, outputs, tiny.answers, INTERVALS)
    num_points = [len(points_of(case, INTERVALS)) for case in tiny.cases]
    # They continue from the last compaction in their prompt; without one, a hit ends before the first.
    for case, output in zip(tiny.cases, outputs, strict=True):
        points, n = points_of(case, INTERVALS), len(case.prompt)
        in_prompt = [point for point in points if point < n]
        if in_prompt:
            assert output.num_cached_tokens == in_prompt[-1], case
        else:
            assert output.num_cached_tokens < min([n, *points]), case
            assert output.num_cached_tokens or n < 64, case
    assert max(num_points) >= 10


def test_each_budget_alone(tiny):
    for case, answer in zip(tiny.cases, tiny.answers, strict=True):
        assert tiny.engine.kv_cache_manager.reset_prefix_cache()
        check([case], ask(tiny.engine, [case]), [answer], INTERVALS)
