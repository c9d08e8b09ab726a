"""The demo model on a GPU in bf16, CUDA graphs, async scheduling and prefix caching on.

bf16 keeps eight bits, so two ways to compute one sum differ, and chance decides between equal logits. The tests are
still strict. Two runs must have equal tokens up to a first difference, where the candidates' logits must be within two
steps of bf16 or within its reach. Up to there their logits must agree as well as bf16 allows. The reach of bf16, how
much it changes logits, is measured: on the Hugging Face reference in bf16 and in fp32.
"""

import random

import pytest
from agreement import agreement, likely_differences, rms, steps_of, tokens_of
from engine import greedy, keep
from ranks import MixedLoad
from reference import check_numbers, expected_compactions
from vllm.config import CUDAGraphMode

pytestmark = pytest.mark.gpu

RULES = {
    **{f"keep {ratio}": {"ratio": ratio} for ratio in ("1.0", "0.9", "0.7", "0.5", "0.3", "0.1")},
    "budget 96": {"ratio": "1", "budget": 96, "first": 4, "last": 32},
    "budget 200": {"ratio": "1", "budget": 200, "first": 4, "last": 64},
    "keep 0.5, budget 400": {"ratio": "0.5", "budget": 400, "first": 4, "last": 64},
}
SHARED = {
    "document": {"ratio": "0.25", "document": 700},
    "document, budget 300": {"ratio": "0.5", "document": 1501, "budget": 300, "first": 4, "last": 64},
    "conversation": {"ratio": "1", "budget": 200, "first": 4, "last": 64},
}
"""Rules that leave rows for other requests, whose prompts begin with the same 1,501 tokens."""
LENGTHS = (1, 33, 200, 449, 1000, 2500)
NUM_TOKENS = 16


def cases_of(text_ids):
    """Returns prompts and names of rules."""
    prompts = [text_ids[7 * i : 7 * i + length] for i, length in enumerate(LENGTHS)]
    return [(prompt, name) for prompt in prompts for name in RULES]


def asks(name):
    return keep(**{**RULES, **SHARED}[name], num_tokens=NUM_TOKENS, logprobs=20)


def moved_by_bf16(exact, rounded, prompt, tokens, **rule):
    """Returns how much bf16 changes the likely tokens' logits along an answer, by the reference."""
    right, bf16 = (reference.logits(prompt, tokens, **rule) for reference in (exact, rounded))
    return (right - bf16).gather(1, right.topk(20).indices).flatten().tolist()


@pytest.fixture(scope="module")
def intervals(on_gpu):
    return on_gpu.scheduler.settings.intervals


@pytest.fixture(scope="module")
def outputs(on_gpu, text_ids):
    """Outputs of every length and rule, in one batch."""
    cases = cases_of(text_ids)
    return on_gpu.generate([prompt for prompt, _ in cases], [asks(name) for _, name in cases])


@pytest.fixture(scope="module")
def mixed(outputs):
    return [steps_of(output) for output in outputs]


@pytest.fixture(scope="module")
def reach(exact, rounded, mixed, text_ids, intervals):
    """By rule, how much bf16 alone changes the likely tokens' logits along the generated texts."""
    moved = {name: [] for name in RULES}
    for (prompt, name), steps in zip(cases_of(text_ids), mixed, strict=True):
        moved[name] += moved_by_bf16(exact, rounded, prompt, tokens_of(steps), intervals=intervals, **RULES[name])
    return moved


def test_the_engine_runs_as_users_run_it(on_gpu):
    config = on_gpu.llm.llm_engine.vllm_config
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
    assert config.scheduler_config.async_scheduling
    assert config.cache_config.enable_prefix_caching
    assert on_gpu.worker.use_v2_model_runner


def test_compactions_are_those_of_the_rule(outputs, text_ids, intervals):
    most = 0
    for (_, name), output in zip(cases_of(text_ids), outputs, strict=True):
        most = max(most, check_numbers(output, intervals=intervals, **RULES[name])["compactions"])
    assert most >= 10, "in the prompt and in the answer"


def test_a_mixed_batch_equals_the_same_requests_one_by_one(on_gpu, mixed, reach, text_ids):
    num_equal, parted_badly = 0, []
    moved = {name: [] for name in RULES}
    for (prompt, name), together in zip(cases_of(text_ids), mixed, strict=True):
        (output,) = on_gpu.generate([prompt], [asks(name)])
        found = agreement(steps_of(output), together)
        if found.steps > 2 and found.gap > max(map(abs, reach[name])):
            parted_badly.append(f"{len(prompt)} tokens, {name}: after {found.num_equal} at {found.gap}")
        moved[name] += found.differences
        num_equal += found.num_equal == NUM_TOKENS
        print(f"{len(prompt)} tokens, {name}: {found.num_equal} equal, then {found.steps} steps of bf16")
    print(f"{num_equal} of {len(mixed)} answers equal")
    assert not parted_badly
    for name in RULES:
        by_bf16 = f"{rms(reach[name]):.3f}, at most {max(map(abs, reach[name])):.3f}"
        print(f"{name}: logits differ by {rms(moved[name]):.3f}, bf16 moves them by {by_bf16}")
        assert rms(moved[name]) <= 2 * rms(reach[name]), name


def test_answers_equal_the_reference(exact, mixed, reach, text_ids, intervals):
    num_equal = 0
    moved = {name: [] for name in RULES}
    for (prompt, name), steps in zip(cases_of(text_ids), mixed, strict=True):
        logits = exact.logits(prompt, tokens_of(steps), intervals=intervals, **RULES[name])
        moved[name] += likely_differences(steps, logits)
        num_equal += logits.argmax(-1).tolist() == tokens_of(steps)
    print(f"{num_equal} of {len(mixed)} answers equal the fp32 reference to the last token")
    for name in RULES:
        print(f"{name}: logits differ by {rms(moved[name]):.3f}, bf16 moves them by {rms(reach[name]):.3f}")
        assert rms(moved[name]) <= 2 * rms(reach[name]), name


def test_the_reach_of_bf16_excludes_other_rules(exact, reach, text_ids, intervals):
    """Another rule's logits are out of reach, so the tests would notice a request compacted twice or not at all."""
    prompt = text_ids[28 : 28 + 1000]
    for name, others in (("keep 0.5", ("keep 1.0", "keep 0.3")), ("budget 200", ("keep 1.0", "budget 96"))):
        tokens = exact.generate(prompt, NUM_TOKENS, intervals=intervals, **RULES[name])
        right = exact.logits(prompt, tokens, intervals=intervals, **RULES[name])
        likely = right.topk(20).indices
        for other in others:
            wrong = exact.logits(prompt, tokens, intervals=intervals, **RULES[other])
            assert rms((right - wrong).gather(1, likely).flatten().tolist()) > 2 * rms(reach[name]), (name, other)


@pytest.mark.parametrize("name", ["keep 0.3", "budget 200"])
def test_a_request_names_the_learned_scorer(name, on_gpu, exact, learned, text_ids, intervals):
    """In a batch with requests without a scorer. The logits of the scorer `l2` are out of reach."""
    rule = {**RULES[name], "intervals": intervals}
    prompts = [text_ids[begin : begin + 1000] for begin in (14, 28, 100)]
    named = keep(**RULES[name], num_tokens=NUM_TOKENS, logprobs=20, scorer="learned")
    outputs = on_gpu.generate(prompts * 2, [named] * len(prompts) + [asks(name)] * len(prompts))
    moved, reach, of_l2 = [], [], []
    for prompt, output in zip(prompts, outputs, strict=False):
        check_numbers(output, **rule)
        steps = steps_of(output)
        right, bf16, l2 = (reference.logits(prompt, tokens_of(steps), **rule) for reference in (*learned, exact))
        likely = right.topk(20).indices
        moved += likely_differences(steps, right)
        reach += (right - bf16).gather(1, likely).flatten().tolist()
        of_l2 += (right - l2).gather(1, likely).flatten().tolist()
    print(f"{name}: logits differ by {rms(moved):.3f}, bf16 moves them by {rms(reach):.3f}, l2 by {rms(of_l2):.3f}")
    assert rms(moved) <= 2 * rms(reach)
    assert rms(of_l2) > 2 * rms(reach)


def test_200_requests_of_mixed_rules_with_aborts(on_gpu, text_ids):
    """Counts and block tables on the device, after every third step; documents and conversations are found."""
    load = MixedLoad(text_ids, [*RULES.values(), *SHARED.values(), *SHARED.values()], max_prompt=1800, num_tokens=48)
    load.run(on_gpu)
    print(load.looks)
    assert load.looks["times"] > 20, load.looks
    assert load.looks["held"] > 25, load.looks
    assert load.looks["compacted"] > 20, load.looks
    assert load.looks["aborted"] > 10, load.looks
    assert load.looks["found documents"], load.looks
    assert load.looks["found conversations"], load.looks
    assert len(load.answers.keys() - set(load.aborted)) == load.num_requests - load.num_aborted
    assert all(len(answer) == 48 for name, answer in load.answers.items() if name not in load.aborted)


def test_a_prompt_of_three_caches(tight, exact, rounded, text_ids):
    """It sets no field: the engine's default budget bounds it, and its logits stay within the reach of bf16."""
    assert tight.scheduler.settings.defaults.max_tokens == 256
    prompt = text_ids[: 3 * tight.num_usable_blocks * min(manager.block_size for manager in tight.managers)]
    assert 2000 < len(prompt) < 4000
    (output,) = tight.generate([prompt], [greedy(NUM_TOKENS, logprobs=20)])
    rule = {"budget": 256, "intervals": tight.scheduler.settings.intervals}
    assert check_numbers(output, **rule)["compactions"] > 8
    steps = steps_of(output)
    reach = moved_by_bf16(exact, rounded, prompt, tokens_of(steps), **rule)
    moved = likely_differences(steps, exact.logits(prompt, tokens_of(steps), **rule))
    print(f"logits differ by {rms(moved):.3f}, bf16 moves them by {rms(reach):.3f}")
    assert rms(moved) <= 2 * rms(reach)


@pytest.mark.parametrize(
    ("name", "fewest", "most"), [("keep 0.5", 800, 1000), ("budget 200", 800, 801)], ids=["ratio", "budget"]
)
def test_prefix_cache_hits_after_compaction(name, fewest, most, on_gpu, reach, text_ids):
    """Hits end before the compaction at the end of the prompt, or at the last compaction before it."""
    prompt = text_ids[100:1100]
    assert on_gpu.kv_cache_manager.reset_prefix_cache()
    (first,) = on_gpu.generate([prompt], [asks(name)])
    (second,) = on_gpu.generate([prompt], [asks(name)])
    assert first.num_cached_tokens == 0
    assert fewest <= second.num_cached_tokens < most
    found = agreement(steps_of(first), steps_of(second))
    assert found.gap <= max(map(abs, reach[name]))
    assert rms(found.differences) <= 2 * rms(reach[name])


def test_prefix_cache_hits_inside_a_large_block(on_gpu, reach, text_ids):
    """For a request that continues differently, vLLM copies the shared part on the device."""
    large = max(manager.block_size for manager in on_gpu.managers)
    prompt = text_ids[100 : 100 + large + 300]
    fork = prompt[: large - 100] + text_ids[2500:2900]
    assert on_gpu.kv_cache_manager.reset_prefix_cache()
    (alone,) = on_gpu.generate([fork], [asks("keep 0.5")])
    assert on_gpu.kv_cache_manager.reset_prefix_cache()
    (before,) = on_gpu.generate([prompt], [asks("keep 1.0")])
    (forked,) = on_gpu.generate([fork], [asks("keep 0.5")])
    (after,) = on_gpu.generate([prompt], [asks("keep 1.0")])
    assert alone.num_cached_tokens == before.num_cached_tokens == 0
    assert large - 200 <= forked.num_cached_tokens < large - 100
    unchanged = agreement(steps_of(before), steps_of(after))
    assert unchanged.gap <= max(map(abs, reach["keep 1.0"])), "the copy or its writer reached the original"
    found = agreement(steps_of(alone), steps_of(forked))
    assert found.gap <= max(map(abs, reach["keep 0.5"]))
    assert rms(found.differences) <= 2 * rms(reach["keep 0.5"])


def test_a_small_cache_preempts_and_stays_whole(on_gpu, text_ids):
    """The requests include questions about one document."""
    rules = list(RULES.values())
    asked = [(text_ids[30 * i : 30 * i + 700], rules[i % len(rules)]) for i in range(24)]
    asked += [(text_ids[: 710 + i], SHARED["document"]) for i in range(12)]
    random.Random(0).shuffle(asked)
    with on_gpu.pool_of(60):
        outputs = on_gpu.llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in asked],
            [keep(**rule, num_tokens=120) for _, rule in asked],
            use_tqdm=False,
        )
    assert all(len(output.outputs[0].token_ids) == 120 for output in outputs)
    on_gpu.check_whole()
    found = [output.kv_transfer_params["kv_cache"].get("found_tokens") for output in outputs]
    assert found.count(700) > 3


@pytest.mark.parametrize("name", SHARED)
def test_answers_from_found_rows_equal_those_from_new_ones(name, on_gpu, exact, rounded, text_ids, intervals):
    """Four continue differently: each alone on an empty cache, then all at once, where one leaves rows for others."""
    rule = {**SHARED[name], "intervals": intervals}
    begin = text_ids[100 : 100 + (rule.get("document") or 1501)]
    prompts = [begin + text_ids[3000 + 40 * i : 3040 + 40 * i] for i in range(4)]
    alone = []
    for prompt in prompts:
        assert on_gpu.kv_cache_manager.reset_prefix_cache()
        alone += on_gpu.generate([prompt], [asks(name)])
    assert on_gpu.kv_cache_manager.reset_prefix_cache()
    together = on_gpu.generate(prompts, [asks(name)] * len(prompts))
    found = max(expected_compactions(len(prompts[0]), len(prompts[0]) - 1, **rule))
    assert [check_numbers(output, **rule).get("found_tokens", 0) for output in alone] == [0] * 4
    assert sorted(check_numbers(output, **rule).get("found_tokens", 0) for output in together) == [0, *[found] * 3]
    assert sorted(output.num_cached_tokens for output in together) == [0, *[found] * 3]
    reach, of_alone, of_exact, of_whole = [], [], [], []
    for prompt, fresh, shared in zip(prompts, map(steps_of, alone), map(steps_of, together), strict=True):
        tokens = tokens_of(shared)
        reach += moved_by_bf16(exact, rounded, prompt, tokens, **rule)
        right, whole = exact.logits(prompt, tokens, **rule), exact.logits(prompt, tokens)
        of_exact += likely_differences(shared, right)
        of_whole += (right - whole).gather(1, right.topk(20).indices).flatten().tolist()
        parts = agreement(fresh, shared)
        of_alone += parts.differences
        assert parts.steps <= 2 or parts.gap <= max(map(abs, reach)), f"they part after {parts.num_equal} tokens"
    print(f"{name}: from alone {rms(of_alone):.3f}, from fp32 {rms(of_exact):.3f}, bf16 {rms(reach):.3f}")
    assert rms(of_alone) <= 2 * rms(reach)
    assert rms(of_exact) <= 2 * rms(reach)
    assert rms(of_whole) > 2 * rms(reach), "the whole cache must be out of reach"
