"""Greedy token ids of the real engine equal those of the reference, in fp32."""

import itertools

import pytest
from engine import greedy, keep

RATIOS = ("1.0", "0.9", "0.7", "0.5", "0.3", "0.1")
LENGTHS = (1, 2, 31, 33, 200, 449, 1000, 3000)
NUM_TOKENS = 8


def prompts_of(text_ids: list[int]) -> dict[int, list[int]]:
    # Different beginnings, so that prompts do not find each other in the prefix cache.
    return {length: text_ids[7 * i : 7 * i + length] for i, length in enumerate(LENGTHS)}


def no_token_twice(text_ids: list[int]) -> list[int]:
    """For engines that compress layer 0.

    Rotation leaves norms alone, so there a token's keys are equally long wherever it stands, and fp32 rounding, another
    on every machine, would decide which of them is kept.
    """
    once = list(dict.fromkeys(text_ids))
    assert len(once) > 720
    return once


def check(engine, reference, cases, full_layers):
    """All cases in one batch, each against the reference."""
    params = [keep(ratio, first, last, NUM_TOKENS) for _, ratio, first, last in cases]
    answers = engine.tokens([prompt for prompt, *_ in cases], params)
    for (prompt, ratio, first, last), answer in zip(cases, answers, strict=True):
        expected = reference.generate(prompt, NUM_TOKENS, ratio, full_layers, first, last)
        assert answer == expected, f"{len(prompt)} tokens, keep {ratio}, protect {first} and {last}"


def test_full_layers_0_and_1_all_ratios_in_one_batch(compressing, reference, text_ids):
    cases = [(prompt, ratio, 0, 0) for prompt in prompts_of(text_ids).values() for ratio in RATIOS]
    check(compressing, reference, cases, full_layers=(0, 1))


def test_no_full_layers_all_ratios_in_one_batch(all_layers, reference, text_ids):
    once = no_token_twice(text_ids)
    prompts = [once[7 * i : 7 * i + length] for i, length in enumerate((1, 33, 449, 700))]
    check(all_layers, reference, [(prompt, ratio, 0, 0) for prompt in prompts for ratio in RATIOS], full_layers=())


@pytest.mark.parametrize("engine_name", ["compressing", "all_layers"])
def test_protected_tokens_are_kept(engine_name, reference, text_ids, request):
    engine = request.getfixturevalue(engine_name)
    full_layers = {"compressing": (0, 1), "all_layers": ()}[engine_name]
    text_ids = no_token_twice(text_ids)
    prompts = [text_ids[:200], text_ids[7:507]]
    cases = [(prompt, ratio, 4, 32) for prompt, ratio in itertools.product(prompts, ("0.5", "0.1"))]
    # More protection than the ratio keeps, and than the prompt has.
    cases += [(text_ids[:200], "0.1", 100, 50), (text_ids[:200], "0.1", 0, 60), (text_ids[:200], "0.1", 300, 0)]
    check(engine, reference, cases, full_layers)


def test_nothing_asked_equals_stock_vllm(compressing, all_layers, stock, text_ids):
    prompts = [prompt for length, prompt in prompts_of(text_ids).items() if length < 1000]
    params = [greedy(NUM_TOKENS)] * len(prompts)
    expected = stock.tokens(prompts, params)
    assert compressing.tokens(prompts, params) == expected
    assert all_layers.tokens(prompts, params) == expected
    for output in compressing.generate(prompts, params):
        assert output.kv_transfer_params is None
