"""Sampling parameters together with compression."""

import json
import re

import pytest
import torch
from engine import greedy, keep
from reference import check_numbers, expected_compactions, expected_numbers
from rules import INTERVALS, RULES
from vllm.sampling_params import StructuredOutputsParams

from vllm_l2kv.block_math import num_blocks_for

EOS = 2  # of the demo model's tokenizer
OF_ONE_CHUNK = [rule for rule in RULES if "document" not in rule.values[0]]
"""Rules under which a prompt of 150 tokens is computed in one step."""


def check_compactions(output, rule: dict) -> None:
    """Checks the compactions of one answer to a prompt of 300 tokens; a budget causes many."""
    numbers = check_numbers(output, intervals=INTERVALS, **rule)
    assert (numbers["compactions"] > 2) is ("budget" in rule)


class TestSeveralAnswers:
    """Prompts with seeds have one chunk: vLLM's CPU runner fails for a seed with a prompt of several chunks."""

    @pytest.mark.parametrize("rule", OF_ONE_CHUNK)
    def test_each_is_compressed_and_follows_its_seed(self, rule, engine, text_ids):
        prompt = text_ids[:150]
        params = keep(**rule, num_tokens=10, n=4, temperature=1.0, seed=7)
        (first,), (second,) = (engine.generate([prompt], [params]) for _ in range(2))
        answers = [list(answer.token_ids) for answer in first.outputs]
        assert answers == [list(answer.token_ids) for answer in second.outputs]
        assert len({tuple(answer) for answer in answers}) == 4
        assert {len(answer) for answer in answers} == {10}

    @pytest.mark.parametrize("rule", OF_ONE_CHUNK)
    def test_a_child_equals_the_same_request_alone(self, rule, engine, text_ids):
        """vLLM seeds child number i with seed + i."""
        prompt = text_ids[:150]
        (together,) = engine.generate([prompt], [keep(**rule, num_tokens=10, n=3, temperature=1.0, seed=7)])
        alone = [
            engine.fresh_tokens(prompt, keep(**rule, num_tokens=10, temperature=1.0, seed=7 + i)) for i in range(3)
        ]
        assert [list(answer.token_ids) for answer in together.outputs] == alone
        # Otherwise the comparison would not test compression.
        assert alone[0] != engine.fresh_tokens(prompt, keep("1.0", num_tokens=10, temperature=1.0, seed=7))

    def test_a_document_with_a_seed_is_refused_here(self, engine, text_ids):
        """A document would cut the prompt into two chunks."""
        rule = RULES[-1].values[0]
        (output,) = engine.generate([text_ids[:150]], [keep(**rule, temperature=1.0, seed=7)])
        assert output.outputs[0].finish_reason == "error"
        assert "seed" in output.outputs[0].stop_reason

    @pytest.mark.parametrize("rule", RULES)
    def test_the_likeliest_tokens_are_those_of_the_reference_in_every_answer(self, rule, engine, expected, text_ids):
        """vLLM refuses `n > 1` at a temperature of 0; `top_k=1` is equally greedy."""
        prompt = text_ids[:300]
        (output,) = engine.generate([prompt], [keep(**rule, n=2, temperature=1.0, top_k=1)])
        assert [list(answer.token_ids) for answer in output.outputs] == [expected(prompt, rule)] * 2
        check_compactions(output, rule)

    @pytest.mark.parametrize("rule", RULES)
    def test_children_free_their_own_blocks(self, rule, engine, text_ids):
        engine.add("r", text_ids[:300], keep(**rule, num_tokens=10, n=1))
        engine.drain()
        engine.llm.llm_engine.add_request(
            "parent", {"prompt_token_ids": text_ids[300:600]}, keep(**rule, num_tokens=10, n=3, temperature=1.0)
        )
        ids = list(engine.scheduler.requests)
        assert len(ids) == 3
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            if all(engine.scheduler.requests[req_id].num_output_tokens > 1 for req_id in ids):
                break
        # In the compressed group each child holds its kept rows and one or a few more.
        num_blocks = num_blocks_for(expected_numbers(300, 2, intervals=INTERVALS, **rule)["kept_tokens"], 32)
        assert [engine.num_blocks(req_id)[1] for req_id in ids] == [num_blocks] * 3
        engine.drain()
        engine.check_whole()


@pytest.mark.parametrize("rule", RULES, scope="class")
class TestTheEnd:
    @pytest.fixture(scope="class")
    def answer(self, rule, engine, text_ids):
        (output,) = engine.generate([text_ids[:300]], [keep(**rule, num_tokens=30)])
        return output.outputs[0]

    def test_stop_string(self, rule, engine, text_ids, tokenizer, answer):
        stop = tokenizer.decode([answer.token_ids[9]]).strip() or tokenizer.decode(answer.token_ids[9:11])
        (output,) = engine.generate([text_ids[:300]], [keep(**rule, num_tokens=30, stop=[stop])])
        stopped = output.outputs[0]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
        assert stopped.text == answer.text[: answer.text.index(stop)]
        assert len(stopped.token_ids) <= 11
        check_compactions(output, rule)

    def test_stop_token(self, rule, engine, text_ids, answer):
        stop = answer.token_ids[9]
        (output,) = engine.generate([text_ids[:300]], [keep(**rule, num_tokens=30, stop_token_ids=[stop])])
        first = list(answer.token_ids).index(stop)
        assert list(output.outputs[0].token_ids) == list(answer.token_ids[: first + 1])
        check_compactions(output, rule)

    def test_min_tokens_holds_the_end_back(self, rule, engine, text_ids):
        """A bias makes the end-of-text token the likeliest from the first token on."""
        bias = {"logit_bias": {EOS: 100.0}, "ignore_eos": False}
        early, late = engine.generate(
            [text_ids[:300]] * 2,
            [keep(**rule, num_tokens=30, **bias), keep(**rule, num_tokens=30, min_tokens=8, **bias)],
        )
        assert list(early.outputs[0].token_ids) == [EOS]
        inside = expected_compactions(300, 299, intervals=INTERVALS, **rule)
        # The answer ended before the compaction at the end of its prompt.
        assert early.kv_transfer_params["kv_cache"]["compactions"] == len(inside)
        assert len(late.outputs[0].token_ids) == 9
        assert late.outputs[0].token_ids[8] == EOS
        assert EOS not in late.outputs[0].token_ids[:8]
        assert late.outputs[0].finish_reason == "stop"
        check_compactions(late, rule)

    def test_ignore_eos_continues_after_it(self, rule, engine, text_ids):
        (output,) = engine.generate([text_ids[:300]], [keep(**rule, num_tokens=9, logit_bias={EOS: 100.0})])
        assert list(output.outputs[0].token_ids) == [EOS] * 9


def values(logprobs) -> list[dict[int, float]]:
    return [{} if at is None else {token: entry.logprob for token, entry in at.items()} for at in logprobs]


def assert_close(left, right):
    left, right = values(left), values(right)
    assert [sorted(at) for at in left] == [sorted(at) for at in right]
    for a, b in zip(left, right, strict=True):
        assert a == pytest.approx(b, abs=2e-4)


def check_close(logprobs, expected: torch.Tensor) -> None:
    """Compares with logprobs of a reference, `[num_tokens, vocabulary]`."""
    for step, at in enumerate(values(logprobs)):
        for token, logprob in at.items():
            assert logprob == pytest.approx(expected[step, token].item(), abs=2e-3)


class TestLogprobs:
    def test_ratio_of_one_equals_stock_vllm(self, engine, plain, text_ids):
        prompt, asked = text_ids[:200], {"num_tokens": 8, "logprobs": 4, "prompt_logprobs": 3}
        (ours,) = engine.generate([prompt], [keep("1.0", **asked)])
        (theirs,) = plain.generate([prompt], [greedy(**asked)])
        assert_close(ours.outputs[0].logprobs, theirs.outputs[0].logprobs)
        assert_close(ours.prompt_logprobs, theirs.prompt_logprobs)

    @pytest.mark.parametrize("length", [200, 700])
    def test_of_a_prompt_do_not_depend_on_the_ratio(self, engine, plain, text_ids, length):
        """Prompt logprobs come from the prefill; 700 tokens take two chunks."""
        prompt = text_ids[:length]
        (ours,) = engine.generate([prompt], [keep("0.25", num_tokens=8, prompt_logprobs=3)])
        (theirs,) = plain.generate([prompt], [greedy(8, prompt_logprobs=3)])
        assert len(ours.prompt_logprobs) == length
        assert_close(ours.prompt_logprobs, theirs.prompt_logprobs)
        assert ours.kv_transfer_params["kv_cache"]["evicted_tokens"] == length * 3 // 4

    def test_of_a_prompt_with_a_budget_equal_the_reference(self, engine, llama_reference, text_ids):
        """After a compaction inside the prompt, tokens see the kept rows; before it, all earlier tokens."""
        prompt, budget = text_ids[:450], 60
        whole, ours = engine.generate([prompt] * 2, [keep("1", prompt_logprobs=3, budget=b) for b in (None, budget)])
        # For the reference, everything after the first token is an answer with the interval of a prompt.
        rule = {"full_layers": (0,), "budget": budget, "intervals": (INTERVALS[0],) * 2}
        expected = llama_reference.logits(prompt[:1], prompt[1:], **rule).log_softmax(-1)
        assert len(ours.prompt_logprobs) == 450
        check_close(ours.prompt_logprobs[1:], expected)
        first = budget + INTERVALS[0] + 1  # the first token that is predicted from evicted rows
        assert_close(ours.prompt_logprobs[:first], whole.prompt_logprobs[:first])
        assert values(ours.prompt_logprobs[first:]) != values(whole.prompt_logprobs[first:])
        assert ours.kv_transfer_params["kv_cache"]["compactions"] > 4

    def test_of_a_prompt_are_never_left_out(self, engine, text_ids):
        """A request for prompt logprobs reads nothing from the prefix cache, as in stock vLLM."""
        for rule in (RULES[1].values[0], RULES[3].values[0]):
            outputs = [engine.generate([text_ids[:300]], [keep(**rule, prompt_logprobs=3)])[0] for _ in range(2)]
            assert outputs[1].num_cached_tokens == 0
            assert len(outputs[1].prompt_logprobs) == 300
            assert_close(*(output.prompt_logprobs for output in outputs))
            check_compactions(outputs[1], rule)

    @pytest.mark.parametrize("rule", RULES)
    def test_of_a_compressed_request_equal_the_reference(self, rule, engine, llama_reference, text_ids):
        prompt = text_ids[:300]
        (output,) = engine.generate([prompt], [keep(**rule, num_tokens=8, logprobs=4)])
        answer = output.outputs[0]
        rule = {**rule, "full_layers": (0,), "intervals": INTERVALS}
        expected = llama_reference.logits(prompt, list(answer.token_ids), **rule)
        check_close(answer.logprobs, expected.log_softmax(-1))


class TestStructuredOutput:
    @pytest.mark.parametrize("rule", RULES)
    def test_regex(self, rule, engine, text_ids):
        grammar = StructuredOutputsParams(regex=r"(yes|no), [0-9]{3} ships\.")
        asked = {"num_tokens": 40, "ignore_eos": False, "structured_outputs": grammar}
        whole, ours = engine.generate([text_ids[7:307], text_ids[:300]], [keep("1.0", **asked), keep(**rule, **asked)])
        for output in (whole, ours):
            assert re.fullmatch(r"(yes|no), [0-9]{3} ships\.", output.outputs[0].text)
            assert output.outputs[0].finish_reason == "stop"
        assert list(ours.outputs[0].token_ids) == engine.fresh_tokens(text_ids[:300], keep(**rule, **asked))
        check_compactions(ours, rule)

    def test_json_schema(self, llama, run, text_ids):
        schema = {
            "type": "object",
            "properties": {"lit": {"type": "boolean"}, "keeper": {"enum": ["Hannah", "Tom"]}},
            "required": ["lit", "keeper"],
            "additionalProperties": False,
        }
        asked = {"num_tokens": 60, "ignore_eos": False, "structured_outputs": StructuredOutputsParams(json=schema)}
        params = [keep("0.25", **asked), keep("1", budget=60, **asked), keep("0.25", budget=80, first=4, **asked)]
        # Otherwise random weights would write spaces without end.
        config = {"backend": "xgrammar", "disable_any_whitespace": True}
        with run(llama, structured_outputs_config=config) as engine:
            outputs = engine.generate([text_ids[:300]] * len(params), params)
            alone = [engine.fresh_tokens(text_ids[:300], asked) for asked in params]
        assert [list(output.outputs[0].token_ids) for output in outputs] == alone
        for output in outputs:
            answer = json.loads(output.outputs[0].text)
            assert isinstance(answer["lit"], bool)
            assert answer["keeper"] in ("Hannah", "Tom")

    def test_constrained_tokens_are_the_likeliest_allowed_ones_of_the_reference(
        self, engine, llama_reference, expected, tokenizer, text_ids
    ):
        """Each request's grammar mask applies to its logits of the compressed context."""
        digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
        asked = {"structured_outputs": StructuredOutputsParams(regex=r"[0-9]{12}")}
        rules = [{"ratio": "1"}, *(rule.values[0] for rule in RULES)]
        prompts = [text_ids[7 * i : 7 * i + 300] for i in range(len(rules) + 1)]
        # And another request without a grammar.
        *outputs, free = engine.tokens(prompts, [*(keep(**rule, **asked) for rule in rules), keep("0.5")])
        assert free == expected(prompts[-1], {"ratio": "0.5"})
        for prompt, rule, answer in zip(prompts[:-1], rules, outputs, strict=True):
            # In this tokenizer each digit is a token.
            assert set(answer) <= set(digits)
            rule = {**rule, "full_layers": (0,), "intervals": INTERVALS}
            logits = llama_reference.logits(prompt, answer, **rule)[:, digits]
            assert [digits[i] for i in logits.argmax(-1).tolist()] == answer
