"""Problems of production: too little memory, aborts, unusual requests. After each test all blocks are free."""

import pytest
from engine import greedy, keep
from reference import expected_numbers
from usages import numbers_of
from weights import made_up_weights, write_profile

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.messages.usage import KeptWhole
from vllm_l2kv.scheduler.integrity import check_nothing_left


@pytest.fixture(params=["compressing", "all_layers"])
def engine(request):
    engine = request.getfixturevalue(request.param)
    yield engine
    assert not engine.llm.llm_engine.has_unfinished_requests()
    engine.check_whole()
    while engine.scheduler.has_finished_requests():  # the next step makes both sides forget them
        engine.step()
    check_nothing_left(engine.scheduler)
    assert engine.worker.num_evicted() == {}


def full_layers_of(engine):
    return engine.worker.settings.full_layers


def test_compaction_in_place_when_no_block_is_free(engine, reference, text_ids):
    prompt = text_ids[:300]
    full = sum(num_blocks_for(301, manager.block_size) for manager in engine.managers)
    with engine.pool_of(full):
        req_id = engine.add("r", prompt, keep("0.5", num_tokens=12))
        engine.step()
        before = [block.block_id for block in engine.managers[-1].req_to_blocks[req_id]]
        engine.step()
        after = [block.block_id for block in engine.managers[-1].req_to_blocks[req_id]]
        assert after == before[: len(after)]
        assert len(after) == num_blocks_for(151, 32)
        answer = engine.drain()["r"]
    assert list(answer.outputs[0].token_ids) == reference.generate(prompt, 12, "0.5", full_layers_of(engine))


def test_a_request_without_room_for_its_compaction_is_preempted(engine, reference, text_ids):
    """There are neither free nor private blocks, so the newest request, this one, restarts when another one ends."""
    prompt = text_ids[:465]
    assert engine.kv_cache_manager.reset_prefix_cache()
    neighbour = engine.add("neighbour", prompt, greedy(8))
    while engine.scheduler.requests[neighbour].num_output_tokens < 1:
        engine.step()
    request = engine.scheduler.requests[engine.add("r", prompt, keep("0.9", num_tokens=14))]
    engine.step()
    with engine.filled_up(4):
        answers = engine.drain()
    assert request.num_preemptions == 1
    assert list(answers["neighbour"].outputs[0].token_ids) == reference.generate(prompt, 8)
    expected = reference.generate(prompt, 14, "0.9", full_layers_of(engine))
    assert list(answers["r"].outputs[0].token_ids) == expected
    assert numbers_of(answers["r"]) == expected_numbers(465, 14, "0.9")


def test_preempted_requests_come_back_and_answer_as_if_undisturbed(engine, text_ids):
    prompts = [text_ids[50 * i : 50 * i + 150] for i in range(6)]
    num_tokens = 80
    undisturbed = engine.tokens(prompts, [keep("0.5", num_tokens=num_tokens)] * len(prompts))
    full, compressed = 150 + num_tokens, 75 + num_tokens
    slots = [full] * (len(engine.managers) - 1) + [compressed]
    needed = sum(num_blocks_for(n, manager.block_size) for n, manager in zip(slots, engine.managers, strict=True))
    with engine.pool_of(len(prompts) * needed - 6):
        ids = [engine.add(str(i), prompt, keep("0.5", num_tokens=num_tokens)) for i, prompt in enumerate(prompts)]
        preempted, answers = set(), {}
        while engine.llm.llm_engine.has_unfinished_requests():
            for output in engine.step():
                answers[output.request_id] = output
            running = engine.scheduler.requests
            preempted |= {i for i, req_id in enumerate(ids) if req_id in running and running[req_id].num_preemptions}
    assert preempted
    assert len(preempted) < len(prompts)
    for i in range(len(prompts)):
        tokens = list(answers[str(i)].outputs[0].token_ids)
        assert len(tokens) == num_tokens
        assert tokens == undisturbed[i]
        assert answers[str(i)].kv_transfer_params["kv_cache"]["evicted_tokens"] == 75


def test_prefix_cache_reset_under_running_requests(engine, text_ids):
    """The reset preempts all running requests."""
    ids = [engine.add(str(i), text_ids[:200], keep("0.3", num_tokens=10)) for i in range(3)]
    for _ in range(4):
        engine.step()
    assert all(engine.num_evicted(req_id) for req_id in ids)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not any(engine.num_evicted(req_id) for req_id in ids)
    answers = engine.drain()
    assert {len(answer.outputs[0].token_ids) for answer in answers.values()} == {10}


@pytest.mark.parametrize("num_steps", range(5))
def test_abort_at_any_step(engine, text_ids, num_steps):
    engine.add("gone", text_ids[:520], keep("0.3", num_tokens=50))
    engine.add("stays", text_ids[600:700], keep("0.3", num_tokens=6))
    for _ in range(num_steps):
        engine.step()
    engine.llm.llm_engine.abort_request(["gone"])
    answers = engine.drain()
    assert set(answers) >= {"stays"}
    assert len(answers["stays"].outputs[0].token_ids) == 6


def test_four_answers_to_one_prompt(engine, reference, text_ids):
    prompt = text_ids[:500]
    (output,) = engine.generate([prompt], [keep("0.3", num_tokens=8, n=4, temperature=1.0, top_k=1)])
    expected = reference.generate(prompt, 8, "0.3", full_layers_of(engine))
    assert [list(answer.token_ids) for answer in output.outputs] == [expected] * 4


def test_a_ratio_that_keeps_one_token(engine, reference, text_ids):
    prompt = text_ids[:200]
    (tokens,) = engine.tokens([prompt], [keep("0.0001")])
    assert tokens == reference.generate(prompt, 12, "0.0001", full_layers_of(engine))


def test_a_profile_of_another_model_ends_the_start(engine, tmp_path, monkeypatch):
    """Also if the check before the model was loaded passed."""
    write_profile(tmp_path / "p", made_up_weights(30, 3, 64))
    monkeypatch.setitem(engine.worker.vllm_config.additional_config["l2kv"], "profile", str(tmp_path / "p"))
    with pytest.raises(ValueError, match="was made for another model, made up"):
        engine.worker.get_kv_cache_spec()


def test_a_prompt_shorter_than_its_protection_keeps_everything(engine, text_ids):
    (output,) = engine.generate([text_ids[:20]], [keep("0.1", 16, 16)])
    assert numbers_of(output) == {**expected_numbers(20, 12), "reason": KeptWhole.PROTECTED}


@pytest.mark.parametrize("extra_args", [{"kv_keep_ratio": 7}, {"kv_keep_ratio": "0.5"}, {"kv_kep_ratio": 0.5}])
def test_a_bad_value_that_came_around_every_check_fails_its_request_alone(engine, text_ids, extra_args):
    good, bad = engine.generate([text_ids[:50]] * 2, [keep("0.5"), greedy(12, extra_args)])
    assert len(good.outputs[0].token_ids) == 12
    assert good.outputs[0].finish_reason == "length"
    assert bad.outputs[0].finish_reason == "error"
