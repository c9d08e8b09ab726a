"""Chunks, order and sharing of prompts, with compression."""

from typing import Any

import pytest
from engine import greedy, keep
from ranks import MixedLoad
from reference import check_numbers, expected_compactions
from rules import INTERVALS, RULES


@pytest.mark.parametrize("max_num_batched_tokens", [37, pytest.param(64, marks=pytest.mark.slow), 2048])
def test_chunked_prefill(max_num_batched_tokens, llama, run, llama_reference, check_exact):
    """37 is not a multiple of a block size, so chunks end inside blocks, and prompts get what decoding leaves."""
    with run(llama, max_num_batched_tokens=max_num_batched_tokens) as engine:
        check_exact(engine, llama_reference)


@pytest.mark.parametrize("asked", [*(pytest.param(asked, marks=pytest.mark.slow) for asked in (None, False)), True])
def test_async_scheduling_is_off_on_cpus_whatever_is_asked(asked, llama, run, llama_reference, check_exact):
    """vLLM's CPU platform switches it off; `tests/gpu` has it on."""
    with run(llama, async_scheduling=asked) as engine:
        assert engine.core.vllm_config.scheduler_config.async_scheduling is False
        check_exact(engine, llama_reference)


def test_without_prefix_caching(llama, run, llama_reference, check_exact, text_ids):
    with run(llama, enable_prefix_caching=False) as engine:
        check_exact(engine, llama_reference)
        for params in (keep("0.5"), keep("1", budget=60), keep("0.5", document=200)):
            (first, second) = (engine.generate([text_ids[:300]], [params])[0] for _ in range(2))
            assert (first.num_cached_tokens or 0) == (second.num_cached_tokens or 0) == 0
            assert first.outputs[0].token_ids == second.outputs[0].token_ids


@pytest.mark.parametrize("length", [33, 95, 96, 97, 130, 400])
def test_one_prompt_by_many_rules_in_one_step(length, engine, expected, text_ids):
    """The other requests find blocks in the prefix cache that the first will write in the same step.

    One of the last two waits for the document of the other.
    """
    prompt = text_ids[:length]
    assert engine.kv_cache_manager.reset_prefix_cache()
    rules = [{"ratio": ratio} for ratio in ("1", "0.5", "0.25")] + [{"ratio": "1", "budget": b} for b in (20, 64)]
    rules += [{"ratio": "0.5", "document": 32}] * 2
    answers = engine.tokens([prompt] * len(rules), [keep(**rule) for rule in rules])
    assert answers == [expected(prompt, rule) for rule in rules]


def test_many_requests_of_mixed_rules_with_aborts(engine, expected, text_ids):
    """After every third step the worker's state equals the scheduler's."""
    load = MixedLoad(text_ids, [{"ratio": "1"}, *(rule.values[0] for rule in RULES)], num_requests=60)
    load.run(engine)
    assert load.looks["held"] > 10, load.looks
    assert load.looks["compacted"] > 10, load.looks
    assert load.looks["aborted"] > 10, load.looks
    assert load.looks["found documents"], load.looks
    assert load.looks["found conversations"], load.looks
    for number, (prompt, rule) in enumerate(zip(load.prompts, load.chosen, strict=True)):
        if str(number) not in load.aborted:
            assert load.answers[str(number)] == expected(prompt, rule), f"{len(prompt)} tokens, {rule}"


def found_again(rule: dict[str, Any]) -> int:
    """Returns the tokens that a prompt of 300 finds the second time: whole blocks, unless it is compacted inside."""
    return max(expected_compactions(300, 299, intervals=INTERVALS, **rule), default=288)


class TestCacheSalt:
    @pytest.fixture
    def ask(self, engine):
        def ask(prompt, rule, salt):
            request = {"prompt_token_ids": list(prompt), "cache_salt": salt}
            (output,) = engine.llm.generate([request], [keep(**rule)], use_tqdm=False)
            engine.check_whole()
            return output.num_cached_tokens, list(output.outputs[0].token_ids)

        return ask

    @pytest.mark.parametrize("rule", RULES)
    def test_only_the_same_salt_hits(self, rule, ask, engine, expected, text_ids):
        prompt, whole = text_ids[:300], {"ratio": "1"}
        answer = expected(prompt, rule)
        assert engine.kv_cache_manager.reset_prefix_cache()
        assert ask(prompt, whole, "mine") == (0, expected(prompt, whole))
        assert ask(prompt, rule, "yours") == (0, answer)
        # Uncompressed rows are found up to the first compaction; then the rows of the last compaction in the prompt.
        first = min(expected_compactions(300, 300, intervals=INTERVALS, **rule))
        num_cached, again = ask(prompt, rule, "mine")
        assert first - 32 <= num_cached < first
        assert again == answer
        assert ask(prompt, rule, "mine") == (found_again(rule), answer)
        assert ask(prompt, rule, "a third one's") == (0, answer)

    def test_no_salt_is_a_salt_of_its_own(self, ask, engine, text_ids):
        prompt = text_ids[:300]
        assert engine.kv_cache_manager.reset_prefix_cache()
        ask(prompt, {"ratio": "0.5"}, "mine")
        (output,) = engine.generate([prompt], [keep("0.5")])
        assert output.num_cached_tokens == 0


@pytest.mark.parametrize("rule", RULES)
def test_reset_of_the_prefix_cache(rule, engine, text_ids):
    prompt = text_ids[:300]
    alone = engine.fresh_tokens(prompt, keep(**rule))
    (hit,) = engine.generate([prompt], [keep(**rule)])
    assert hit.num_cached_tokens == found_again(rule)
    assert engine.llm.reset_prefix_cache()
    (missed,) = engine.generate([prompt], [keep(**rule)])
    assert missed.num_cached_tokens == 0
    assert list(hit.outputs[0].token_ids) == list(missed.outputs[0].token_ids) == alone


@pytest.mark.parametrize("rule", RULES)
class TestPause:
    """Level 0 of sleep mode, the only one on a CPU: vLLM stops scheduling."""

    @pytest.mark.parametrize("clear_cache", [False, True])
    def test_compacted_requests_continue(self, rule, clear_cache, engine, expected, text_ids):
        """With the cache cleared, as at levels 1 and 2, they are preempted, prefilled and compacted again."""
        prompt = text_ids[:300]
        assert engine.kv_cache_manager.reset_prefix_cache()
        req_id = engine.add("r", prompt, keep(**rule))
        while engine.scheduler.requests[req_id].num_output_tokens < 5:
            engine.step()
        assert engine.num_evicted(req_id)
        engine.core.pause_scheduler(mode="keep", clear_cache=clear_cache)
        num_tokens = engine.scheduler.requests[req_id].num_output_tokens
        for _ in range(3):
            engine.step()
        assert engine.scheduler.requests[req_id].num_output_tokens <= num_tokens + 1
        assert (engine.num_evicted(req_id) == 0) is clear_cache
        engine.core.resume_scheduler()
        answer = engine.drain()["r"]
        engine.check_whole()
        assert list(answer.outputs[0].token_ids) == expected(prompt, rule)
        numbers = check_numbers(answer, intervals=INTERVALS, **rule)
        assert (numbers["compactions"] > 3) is ("budget" in rule)


def test_sleep_mode_itself_is_refused_by_vllm(llama, run):
    with pytest.raises(ValueError, match="Sleep mode is not supported"), run(llama, enable_sleep_mode=True):
        pass


class TestPriority:
    @pytest.fixture(scope="class")
    def by_priority(self, llama, run):
        with run(llama, scheduling_policy="priority") as engine:
            yield engine

    @pytest.mark.parametrize(
        "rule", [pytest.param({"ratio": "0.5"}, id="ratio"), pytest.param({"ratio": "1", "budget": 126}, id="budget")]
    )
    def test_the_least_urgent_is_preempted_and_compacted_again(self, rule, by_priority, expected, text_ids):
        engine, num_tokens = by_priority, 120
        prompts = {name: text_ids[100 * i : 100 * i + 200] for i, name in enumerate(("idle", "idler", "urgent"))}
        ids, preempted, order, answers = {}, set(), [], {}
        # A request holds 3 + 7 blocks before it is compacted and 3 + 4 right after it; the fifth block of the
        # compressed layers comes sooner or later.
        with engine.pool_of(24):
            for name, priority in (("idle", 5), ("idler", 6)):
                ids[name] = engine.add(name, prompts[name], keep(**rule, num_tokens=num_tokens), priority)
            while not all(engine.num_evicted(req_id) for req_id in ids.values()):
                engine.step()
            ids["urgent"] = engine.add("urgent", prompts["urgent"], keep(**rule, num_tokens=num_tokens), 0)
            while engine.llm.llm_engine.has_unfinished_requests():
                for output in engine.step():
                    answers[output.request_id] = output
                    order += [output.request_id] if output.finished else []
                requests = engine.scheduler.requests
                preempted |= {n for n, req_id in ids.items() if req_id in requests and requests[req_id].num_preemptions}
        engine.check_whole()
        assert preempted == {"idler"}
        assert order[-1] == "idler"
        for name, answer in answers.items():
            assert list(answer.outputs[0].token_ids) == expected(prompts[name], rule, num_tokens), name
            check_numbers(answer, intervals=INTERVALS, **rule)

    def test_equal_priorities(self, by_priority, llama_reference, check_exact):
        check_exact(by_priority, llama_reference)

    def test_a_waiting_urgent_request_goes_first(self, by_priority, text_ids):
        engine = by_priority
        with engine.pool_of(12):
            for name, priority in (("last", 9), ("second", 3), ("first", 0)):
                prompt = text_ids[200 + 100 * priority : 400 + 100 * priority]
                engine.add(name, prompt, keep("0.5", num_tokens=6), priority=priority)
            finished = []
            while engine.llm.llm_engine.has_unfinished_requests():
                finished += [output.request_id for output in engine.step() if output.finished]
        assert finished == ["first", "second", "last"]
        engine.check_whole()


def test_uncompressed_requests_equal_stock_vllm(engine, plain, cases):
    prompts = [case.prompt for case in cases]
    assert engine.tokens(prompts, [greedy()] * len(prompts)) == plain.tokens(prompts, [greedy()] * len(prompts))
