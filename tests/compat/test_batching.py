"""How prompts are cut, ordered and shared, with compression on."""

import pytest
from engine import greedy, keep


@pytest.mark.parametrize("max_num_batched_tokens", [37, 64, 2048])
def test_chunked_prefill(max_num_batched_tokens, llama, run, llama_reference, check_exact):
    """37 is no multiple of any block: chunks end inside blocks, and prompts beside decodes get what is left."""
    with run(llama, max_num_batched_tokens=max_num_batched_tokens) as engine:
        check_exact(engine, llama_reference)


@pytest.mark.parametrize("asked", [None, False, True])
def test_async_scheduling_is_off_on_cpus_whatever_is_asked(asked, llama, run, llama_reference, check_exact):
    """vLLM's CPU platform switches it off; `tests/gpu` has it on."""
    with run(llama, async_scheduling=asked) as engine:
        assert engine.core.vllm_config.scheduler_config.async_scheduling is False
        check_exact(engine, llama_reference)


def test_without_prefix_caching(llama, run, llama_reference, check_exact, text_ids):
    with run(llama, enable_prefix_caching=False) as engine:
        check_exact(engine, llama_reference)
        (first, second) = (engine.generate([text_ids[:300]], [keep("0.5")])[0] for _ in range(2))
        assert (first.num_cached_tokens or 0) == (second.num_cached_tokens or 0) == 0


@pytest.mark.parametrize("length", [33, 95, 96, 97, 130, 400])
def test_one_prompt_at_three_ratios_in_one_step(length, engine, llama_reference, text_ids):
    """The second and third find blocks in the prefix cache that the first has yet to write in this very step."""
    prompt = text_ids[:length]
    assert engine.kv_cache_manager.reset_prefix_cache()
    ratios = ("1.0", "0.5", "0.25")
    answers = engine.tokens([prompt] * 3, [keep(ratio) for ratio in ratios])
    assert answers == [llama_reference.generate(prompt, 12, ratio, (0,)) for ratio in ratios]


class TestCacheSalt:
    @pytest.fixture
    def ask(self, engine):
        def ask(prompt, ratio, salt):
            request = {"prompt_token_ids": list(prompt), "cache_salt": salt}
            (output,) = engine.llm.generate([request], [keep(ratio)], use_tqdm=False)
            engine.check_whole()
            return output.num_cached_tokens, list(output.outputs[0].token_ids)

        return ask

    def test_only_the_same_salt_hits(self, ask, engine, llama_reference, text_ids):
        prompt = text_ids[:300]
        half = llama_reference.generate(prompt, 12, "0.5", (0,))
        quarter = llama_reference.generate(prompt, 12, "0.25", (0,))
        assert engine.kv_cache_manager.reset_prefix_cache()
        assert ask(prompt, "0.5", "mine") == (0, half)
        assert ask(prompt, "0.5", "yours") == (0, half)
        num_cached, answer = ask(prompt, "0.25", "mine")
        assert num_cached >= 288
        assert answer == quarter
        assert ask(prompt, "0.25", "a third one's") == (0, quarter)

    def test_no_salt_is_a_salt_of_its_own(self, ask, engine, text_ids):
        prompt = text_ids[:300]
        assert engine.kv_cache_manager.reset_prefix_cache()
        ask(prompt, "0.5", "mine")
        (output,) = engine.generate([prompt], [keep("0.5")])
        assert output.num_cached_tokens == 0


def test_reset_of_the_prefix_cache(engine, text_ids):
    prompt = text_ids[:300]
    alone = engine.fresh_tokens(prompt, keep("0.5"))
    (hit,) = engine.generate([prompt], [keep("0.5")])
    assert hit.num_cached_tokens >= 288
    assert engine.llm.reset_prefix_cache()
    (missed,) = engine.generate([prompt], [keep("0.5")])
    assert missed.num_cached_tokens == 0
    assert list(hit.outputs[0].token_ids) == list(missed.outputs[0].token_ids) == alone


class TestPause:
    """What is left of sleep mode on a CPU: vLLM stops scheduling, which is level 0."""

    @pytest.mark.parametrize("clear_cache", [False, True])
    def test_requests_that_were_compacted_go_on(self, engine, llama_reference, text_ids, clear_cache):
        """With the cache cleared, as at levels 1 and 2, they are preempted, prefilled and compacted again."""
        prompt = text_ids[:300]
        assert engine.kv_cache_manager.reset_prefix_cache()
        req_id = engine.add("r", prompt, keep("0.25", num_tokens=12))
        while not engine.num_evicted(req_id):
            engine.step()
        engine.core.pause_scheduler(mode="keep", clear_cache=clear_cache)
        num_tokens = engine.scheduler.requests[req_id].num_output_tokens
        for _ in range(3):
            engine.step()
        assert engine.scheduler.requests[req_id].num_output_tokens <= num_tokens + 1
        assert (engine.num_evicted(req_id) == 0) is clear_cache
        engine.core.resume_scheduler()
        answer = engine.drain()["r"]
        engine.check_whole()
        assert answer.kv_transfer_params["kv_cache"]["evicted_tokens"] == 225
        if clear_cache:
            assert len(answer.outputs[0].token_ids) == 12
        else:
            assert list(answer.outputs[0].token_ids) == llama_reference.generate(prompt, 12, "0.25", (0,))

    def test_sleep_mode_itself_is_refused_by_vllm(self, llama, run):
        with pytest.raises(ValueError, match="Sleep mode is not supported"), run(llama, enable_sleep_mode=True):
            pass


class TestPriority:
    @pytest.fixture(scope="class")
    def by_priority(self, llama, run):
        with run(llama, scheduling_policy="priority") as engine:
            yield engine

    def test_the_least_urgent_is_preempted_and_compacted_again(self, by_priority, llama_reference, text_ids):
        engine, num_tokens = by_priority, 120
        prompts = {name: text_ids[100 * i : 100 * i + 200] for i, name in enumerate(("idle", "idler", "urgent"))}
        ids, preempted, order, answers = {}, set(), [], {}
        # A request holds 3 + 7 blocks before it is compacted, 3 + 4 right after it, 4 + 7 when it ends.
        with engine.pool_of(24):
            for name, priority in (("idle", 5), ("idler", 6)):
                ids[name] = engine.add(name, prompts[name], keep("0.5", num_tokens=num_tokens), priority)
            while not all(engine.num_evicted(req_id) for req_id in ids.values()):
                engine.step()
            ids["urgent"] = engine.add("urgent", prompts["urgent"], keep("0.5", num_tokens=num_tokens), 0)
            while engine.llm.llm_engine.has_unfinished_requests():
                for output in engine.step():
                    answers[output.request_id] = output
                    order += [output.request_id] if output.finished else []
                requests = engine.scheduler.requests
                preempted |= {n for n, req_id in ids.items() if req_id in requests and requests[req_id].num_preemptions}
        engine.check_whole()
        assert preempted == {"idler"}
        assert order[-1] == "idler"
        for name in ("idle", "urgent"):
            expected = llama_reference.generate(prompts[name], num_tokens, "0.5", (0,))
            assert list(answers[name].outputs[0].token_ids) == expected, name
        for answer in answers.values():
            assert len(answer.outputs[0].token_ids) == num_tokens
            assert answer.kv_transfer_params["kv_cache"]["evicted_tokens"] == 100

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
    prompts = [prompt for prompt, _ in cases]
    assert engine.tokens(prompts, [greedy()] * len(prompts)) == plain.tokens(prompts, [greedy()] * len(prompts))
