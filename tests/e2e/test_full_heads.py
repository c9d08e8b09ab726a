"""Classes of KV heads: layers in which some heads compact and others never do, against the reference, in fp32."""

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
from engine import Engine, bare_rule, draw, keep, running, tokens_of
from reference import check_numbers, expected_compactions
from scored import TELLING_SCORERS, ScoredReference
from usages import memory_ratio

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.kv_cache_spec import CompressedLayerSpec, FullLayerSpec, full_name, group_layer_specs
from vllm_l2kv.scheduler.cache_manager import CompressedLayerManager
from vllm_l2kv.scheduler.integrity import check_requests
from vllm_l2kv.worker.heads import FullHeads, SplitAttention

INTERVALS = (100, 16)
NUM_TOKENS = 12
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4}
"""Two query heads for each KV head, in four layers."""

Rule = Mapping[str, Any]
Case = tuple[Sequence[int], Rule, list[int]]
"""A prompt, its rule, and the reference's answer."""

SPREAD = ((), {0: (1,), 1: (0, 3), 3: (2,)})
"""One layer in which the heads of each class are contiguous, one in which they are not, one without a full head."""
MANY = ((0,), {1: (1,), 2: (0, 1, 2, 3), 3: (0, 1)})
"""Two layers have only full heads, one of them named by its heads. In total more heads are full than compact."""
HALF = ((), dict.fromkeys(range(4), (1, 2)))
"""Blocks of both classes are equal, so vLLM keeps its own layout."""


class Heads(NamedTuple):
    """An engine with full heads, and the reference."""

    engine: Engine
    reference: ScoredReference

    def cases(self, asked: Sequence[tuple[int, Rule]], seed: int = 0) -> list[Case]:
        """Returns prompts of so many different tokens, for which rounding decides nothing."""
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

    def specs(self, of_class: type) -> list[Any]:
        """Returns the specs of the caches of one class."""
        groups = self.engine.worker.model_runner.kv_cache_config.kv_cache_groups
        specs = [spec for group in groups for spec in group_layer_specs(group).values()]
        return [spec for spec in specs if isinstance(spec, of_class)]

    def check(self, cases: Sequence[Case]) -> list[Any]:
        """Checks all cases in one batch; returns the outputs."""
        params = [keep(**{"ratio": 1, **rule}) for _, rule, _ in cases]
        outputs = self.engine.generate([prompt for prompt, _, _ in cases], params)
        for (prompt, rule, answer), output in zip(cases, outputs, strict=True):
            assert tokens_of(output) == answer, f"{len(prompt)} tokens, {rule}"
            check_numbers(output, intervals=INTERVALS, **of_counts(rule))
        return outputs


def of_counts(rule: Rule) -> dict[str, Any]:
    """Returns the part of a rule that decides how many rows are kept."""
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


def test_all_rules_in_one_batch_and_again_with_the_prefix_cache(heads):
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


def test_each_class_is_a_group_of_its_own(heads):
    groups = {group["compressed"]: group for group in heads.engine.worker.kv_cache_groups()}
    full = {name for name, layer in heads.engine.worker._layers.items() if isinstance(layer, FullHeads)}
    mixed = {name for name, layer in heads.engine.worker._layers.items() if isinstance(layer.impl, SplitAttention)}
    assert {full_name(name) for name in mixed} == full
    assert full <= set(groups[False]["layers"])
    assert mixed <= set(groups[True]["layers"])
    sizes = {compressed: group["block_size"] for compressed, group in groups.items()}
    num_full = sum(spec.num_kv_heads for spec in heads.specs(FullLayerSpec))
    num_compressed = sum(spec.num_kv_heads for spec in heads.specs(CompressedLayerSpec))
    assert num_full + num_compressed == 4 * 4
    assert sizes[False] == 32 * max(num_compressed // num_full, 1)
    assert sizes[True] == 32 * max(num_full // num_compressed, 1)


def test_a_request_holds_the_blocks_and_the_memory_of_its_heads(heads):
    prompt, num_tokens = draw(random.Random(1), 500), 50
    evicted, seen = 0, set()
    req_id = heads.engine.add("r", prompt, keep("0.2", num_tokens=num_tokens))
    while (request := heads.engine.scheduler.requests.get(req_id)) is not None:
        evicted = 400 if request.num_output_tokens > 1 else 0
        computed = request.num_computed_tokens
        for manager, num_held in zip(heads.engine.managers, heads.engine.num_blocks(req_id), strict=True):
            num_slots = computed - (evicted if isinstance(manager, CompressedLayerManager) else 0)
            assert num_held == num_blocks_for(num_slots, manager.block_size), f"{computed} computed tokens"
        seen.add(evicted)
        outputs = heads.engine.step()
    assert seen == {0, 400}
    share = Fraction(sum(spec.num_kv_heads for spec in heads.specs(FullLayerSpec)), 4 * 4)
    assert outputs[0].kv_transfer_params["kv_cache"]["memory_ratio"] == memory_ratio(149, 549, share)


def test_other_questions_find_a_document_and_shared_blocks_stay_as_they_are(heads):
    rule, chance = {"ratio": "0.4", "document": 210}, random.Random(2)
    document = draw(chance, 210)
    cases = []
    while len(cases) < 4:
        prompt = [*document, *draw(chance, 60)]
        if (answer := heads.answer(prompt, rule)) is not None:
            cases.append((prompt, rule, answer))
    for number, case in enumerate(cases):
        (output,) = heads.check([case])
        assert output.num_cached_tokens == (210 if number else 0)
    assert all(output.num_cached_tokens == 210 for output in heads.check(cases))


def test_a_crowd_in_a_small_pool_is_preempted_and_answers_as_alone(heads):
    chance = random.Random(3)
    rules = [{"ratio": "0.5"}, {"ratio": "0.2"}, {"budget": 80}, {"ratio": "0.4", "document": 90}, {"ratio": "1"}]
    asked = [(chance.randint(95, 360), {**chance.choice(rules), "num_tokens": 30}) for _ in range(16)]
    cases = heads.cases(asked, seed=4)
    engine, preempted = heads.engine, 0
    with engine.pool_of(34):
        for number, (prompt, rule, _) in enumerate(cases):
            engine.add(str(number), prompt, keep(**{"ratio": 1, **rule}))
        answers = {}
        while engine.llm.llm_engine.has_unfinished_requests():
            answers.update({output.request_id: tokens_of(output) for output in engine.step()})
            check_requests(engine.scheduler)
            preempted = max(preempted, sum(request.num_preemptions for request in engine.scheduler.requests.values()))
    assert [answers[str(number)] for number in range(len(cases))] == [answer for _, _, answer in cases]
    assert preempted
