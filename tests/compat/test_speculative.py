"""Speculative decoding: drafts are written into slots of compacted requests, and many are rejected.

By n-grams; by a draft model, which is the model itself on its whole cache; by EAGLE and EAGLE-3 heads with random
weights, and by a layer of the model that predicts the token after the next one, of which most are.
"""

import sys
from collections import Counter

import pytest
import tiny
from engine import keep
from reference import check_numbers
from rules import INTERVALS

NUM_TOKENS = 64
RULES = [
    *({"ratio": ratio} for ratio in ("1.0", "0.5", "0.25")),
    {"ratio": "1", "budget": 50},
    {"ratio": "0.5", "budget": 70, "first": 4, "last": 16},
    {"ratio": "0.5", "document": 39},
]
"""Rules whose budgets compact some of the prompts before their end."""
VOCABULARY = 64
"""A vocabulary so small that a model with random weights sometimes repeats itself, and some drafts are accepted."""


@pytest.fixture(scope="module")
def model(method, tiny_model, tmp_path_factory):
    """A model with six layers: with one or six layers that draft, vLLM makes one group for each class."""
    shape = {"vocab_size": VOCABULARY, "num_hidden_layers": 4 if method == "ngram" else 6}
    if method != "mtp":
        return tiny_model("llama", **shape)
    return tiny.write_mtp(tmp_path_factory.mktemp("mtp"), tiny_model("qwen2", hidden_size=128, **shape))


@pytest.fixture(scope="module")
def head(method, tmp_path_factory):
    """An EAGLE head, of either kind."""
    write = {"eagle": tiny.write_eagle, "eagle3": tiny.write_eagle3}[method]
    return write(tmp_path_factory.mktemp(method), tiny.llama(vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def small_reference(model):
    from reference import Reference

    return Reference(model)


@pytest.fixture(scope="module")
def answers(small_reference, prompts):
    """Returns the reference's answers by a rule."""

    def answers(rule, num_tokens=NUM_TOKENS):
        rule = {**rule, "full_layers": (0,), "intervals": INTERVALS}
        return [small_reference.generate(prompt, num_tokens, **rule) for prompt in prompts]

    return answers


@pytest.fixture(
    scope="module",
    params=[
        "ngram",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("draft_model", "eagle", "eagle3", "mtp")),
    ],
)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def drafting(method, model, run, request):
    speculative = {"method": method, "num_speculative_tokens": 4}
    if method == "ngram":
        speculative |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    elif method != "mtp":
        speculative["model"] = str(model if method == "draft_model" else request.getfixturevalue("head"))
    with run(model, speculative_config=speculative) as engine:
        yield engine
    # N-grams import numba. When an engine starts, vLLM reads the variables of every module, and fails on numba's.
    sys.modules.pop("llvmlite.binding.ffi", None)


@pytest.fixture(scope="module")
def prompts(text_ids):
    """Prompts of different lengths; none begins another one."""
    return [[token % VOCABULARY for token in text_ids[17 * i : 17 * i + 40 + 37 * i]] for i in range(8)]


@pytest.fixture
def counted(drafting, monkeypatch) -> Counter:
    """Counts draft tokens scheduled and accepted, and requests preempted, from now on."""
    counts: Counter = Counter()
    schedule, update = drafting.scheduler.schedule, drafting.scheduler.update_from_output

    def count_drafts(*args, **kwargs):
        output = schedule(*args, **kwargs)
        counts["preempted"] += len(output.preempted_req_ids or ())
        counts["drafts"] += sum(map(len, output.scheduled_spec_decode_tokens.values()))
        return output

    def count_accepted(scheduler_output, model_output):
        drafted = scheduler_output.scheduled_spec_decode_tokens
        sampled = zip(model_output.req_ids, model_output.sampled_token_ids, strict=True)
        counts["accepted"] += sum(len(tokens) - 1 for req_id, tokens in sampled if req_id in drafted)
        return update(scheduler_output, model_output)

    monkeypatch.setattr(drafting.scheduler, "schedule", count_drafts)
    monkeypatch.setattr(drafting.scheduler, "update_from_output", count_accepted)
    return counts


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_answers_equal_the_reference(rule, method, drafting, counted, answers, prompts):
    """No draft crosses a compaction, so few drafts are accepted where one is due every three tokens."""
    for _ in range(1 + ("document" in rule)):  # computed, then found
        outputs = drafting.generate(prompts, [keep(**rule, num_tokens=NUM_TOKENS)] * len(prompts))
    assert [list(output.outputs[0].token_ids) for output in outputs] == answers(rule)
    for output in outputs:
        numbers = check_numbers(output, intervals=INTERVALS, **rule)
        assert (numbers["compactions"] > 3) is ("budget" in rule)
        assert numbers.get("found_tokens") == rule.get("document")
    print(counted)
    if method == "draft_model" and rule == RULES[0]:
        assert counted["accepted"] == counted["drafts"] > 300, "both see the whole cache"
        return
    assert counted["accepted"] > (30 if method in ("ngram", "draft_model") else 0)
    assert counted["drafts"] - counted["accepted"] > 30


@pytest.mark.parametrize("num_tokens", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("rule", [RULES[1], RULES[3]], ids=str)
def test_an_answer_ends_inside_a_row_of_drafts(num_tokens, rule, drafting, answers, prompts):
    assert drafting.tokens(prompts, [keep(**rule, num_tokens=num_tokens)] * len(prompts)) == answers(rule, num_tokens)


def test_a_small_cache_preempts(drafting, counted, answers, prompts):
    """A preempted request gives up its drafts with its blocks, and is compacted again at the same position.

    With ratios: with budgets, requests are admitted only if they need not be preempted here.
    """
    rule = RULES[1]
    params = [keep(**rule, num_tokens=NUM_TOKENS)] * len(prompts)
    with drafting.pool_of(24):
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = drafting.llm.generate(requests, params, use_tqdm=False)
    drafting.check_whole()
    assert counted["preempted"] > 0
    assert [list(output.outputs[0].token_ids) for output in outputs] == answers(rule)


def test_no_room_for_a_compaction(drafting, counted, small_reference, prompts):
    """Its blocks are shared and none is free: the request is preempted with its drafts, and its answer is the same."""
    prompt = prompts[-1]
    assert drafting.kv_cache_manager.reset_prefix_cache()
    drafting.add("shares its blocks", prompt, keep("1.0", num_tokens=60))
    drafting.step()
    drafting.add("r", prompt, keep("0.5", num_tokens=30))
    drafting.step()
    with drafting.filled_up(3):
        for _ in range(3):
            drafting.step()
        assert counted["preempted"] == 1
    last = drafting.drain()
    assert list(last["r"].outputs[0].token_ids) == small_reference.generate(prompt, 30, "0.5", (0,))
    drafting.check_whole()
