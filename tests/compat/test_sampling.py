"""What a request may ask of sampling, together with compression."""

import json
import re

import pytest
from engine import greedy, keep
from vllm.sampling_params import StructuredOutputsParams

EOS = 2  # of the demo model's tokenizer


class TestSeveralAnswers:
    def test_each_is_compressed_and_follows_its_seed(self, engine, text_ids):
        prompt = text_ids[:300]
        params = keep("0.25", num_tokens=10, n=4, temperature=1.0, seed=7)
        (first,), (second,) = (engine.generate([prompt], [params]) for _ in range(2))
        answers = [list(answer.token_ids) for answer in first.outputs]
        assert answers == [list(answer.token_ids) for answer in second.outputs]
        assert len({tuple(answer) for answer in answers}) == 4
        assert {len(answer) for answer in answers} == {10}

    def test_a_child_equals_the_same_request_alone(self, engine, text_ids):
        """vLLM seeds child number i with seed + i."""
        prompt = text_ids[:300]
        (together,) = engine.generate([prompt], [keep("0.25", num_tokens=10, n=3, temperature=1.0, seed=7)])
        alone = [
            engine.fresh_tokens(prompt, keep("0.25", num_tokens=10, temperature=1.0, seed=7 + i)) for i in range(3)
        ]
        assert [list(answer.token_ids) for answer in together.outputs] == alone
        # Or the comparison would say nothing of compression.
        assert alone[0] != engine.fresh_tokens(prompt, keep("1.0", num_tokens=10, temperature=1.0, seed=7))

    def test_children_free_their_own_blocks(self, engine, text_ids):
        engine.add("r", text_ids[:300], keep("0.25", num_tokens=10, n=1))
        engine.drain()
        engine.llm.llm_engine.add_request(
            "parent", {"prompt_token_ids": text_ids[300:600]}, keep("0.25", num_tokens=10, n=3, temperature=1.0, seed=1)
        )
        ids = list(engine.scheduler.requests)
        assert len(ids) == 3
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            if all(engine.num_evicted(req_id) for req_id in ids):
                break
        # 75 kept tokens and one more: three blocks for each child, in the compressed group.
        assert [engine.num_blocks(req_id)[1] for req_id in ids] == [3] * 3
        engine.drain()
        engine.check_whole()


class TestTheEnd:
    @pytest.fixture(scope="class")
    def answer(self, engine, text_ids):
        (output,) = engine.generate([text_ids[:200]], [keep("0.5", num_tokens=30)])
        return output.outputs[0]

    def test_stop_string(self, engine, text_ids, tokenizer, answer):
        stop = tokenizer.decode([answer.token_ids[9]]).strip() or tokenizer.decode(answer.token_ids[9:11])
        (output,) = engine.generate([text_ids[:200]], [keep("0.5", num_tokens=30, stop=[stop])])
        stopped = output.outputs[0]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
        assert stopped.text == answer.text[: answer.text.index(stop)]
        assert len(stopped.token_ids) <= 11
        assert output.kv_transfer_params["kv_cache"]["evicted_tokens"] == 100

    def test_stop_token(self, engine, text_ids, answer):
        stop = answer.token_ids[9]
        (output,) = engine.generate([text_ids[:200]], [keep("0.5", num_tokens=30, stop_token_ids=[stop])])
        first = list(answer.token_ids).index(stop)
        assert list(output.outputs[0].token_ids) == list(answer.token_ids[: first + 1])

    def test_min_tokens_holds_the_end_back(self, engine, text_ids):
        """A bias makes the end-of-text token the likeliest from the first token on."""
        bias = {"logit_bias": {EOS: 100.0}, "ignore_eos": False}
        early, late = engine.generate(
            [text_ids[:200]] * 2,
            [keep("0.5", num_tokens=30, **bias), keep("0.5", num_tokens=30, min_tokens=8, **bias)],
        )
        assert list(early.outputs[0].token_ids) == [EOS]
        assert early.kv_transfer_params["kv_cache"]["evicted_tokens"] == 0  # ended before compaction
        assert len(late.outputs[0].token_ids) == 9
        assert late.outputs[0].token_ids[8] == EOS
        assert EOS not in late.outputs[0].token_ids[:8]
        assert late.outputs[0].finish_reason == "stop"
        assert late.kv_transfer_params["kv_cache"]["evicted_tokens"] == 100

    def test_ignore_eos_goes_on_behind_it(self, engine, text_ids):
        (output,) = engine.generate([text_ids[:200]], [keep("0.5", num_tokens=9, logit_bias={EOS: 100.0})])
        assert list(output.outputs[0].token_ids) == [EOS] * 9


def values(logprobs) -> list[dict[int, float]]:
    return [{} if at is None else {token: entry.logprob for token, entry in at.items()} for at in logprobs]


def assert_close(left, right):
    left, right = values(left), values(right)
    assert [sorted(at) for at in left] == [sorted(at) for at in right]
    for a, b in zip(left, right, strict=True):
        assert a == pytest.approx(b, abs=2e-4)


class TestLogprobs:
    def test_ratio_of_one_equals_stock_vllm(self, engine, plain, text_ids):
        prompt, asked = text_ids[:200], {"num_tokens": 8, "logprobs": 4, "prompt_logprobs": 3}
        (ours,) = engine.generate([prompt], [keep("1.0", **asked)])
        (theirs,) = plain.generate([prompt], [greedy(**asked)])
        assert_close(ours.outputs[0].logprobs, theirs.outputs[0].logprobs)
        assert_close(ours.prompt_logprobs, theirs.prompt_logprobs)

    @pytest.mark.parametrize("length", [200, 700])
    def test_of_a_prompt_do_not_know_of_compression(self, engine, plain, text_ids, length):
        """They come from the prefill; 700 tokens take two chunks."""
        prompt = text_ids[:length]
        (ours,) = engine.generate([prompt], [keep("0.25", num_tokens=8, prompt_logprobs=3)])
        (theirs,) = plain.generate([prompt], [greedy(8, prompt_logprobs=3)])
        assert len(ours.prompt_logprobs) == length
        assert_close(ours.prompt_logprobs, theirs.prompt_logprobs)
        assert ours.kv_transfer_params["kv_cache"]["kept_tokens"] == length // 4

    def test_of_a_compressed_request_equal_the_reference(self, engine, llama_reference, text_ids):
        prompt = text_ids[:200]
        (output,) = engine.generate([prompt], [keep("0.25", num_tokens=8, logprobs=4)])
        answer = output.outputs[0]
        expected = llama_reference.logits(prompt, list(answer.token_ids), "0.25", (0,)).log_softmax(-1)
        for step, at in enumerate(values(answer.logprobs)):
            for token, logprob in at.items():
                assert logprob == pytest.approx(expected[step, token].item(), abs=2e-3)


class TestStructuredOutput:
    def test_regex(self, engine, text_ids):
        grammar = StructuredOutputsParams(regex=r"(yes|no), [0-9]{3} ships\.")
        params = [keep(ratio, num_tokens=40, ignore_eos=False, structured_outputs=grammar) for ratio in ("1.0", "0.25")]
        outputs = engine.generate([text_ids[:300], text_ids[7:307]], params)
        for output in outputs:
            assert re.fullmatch(r"(yes|no), [0-9]{3} ships\.", output.outputs[0].text)
            assert output.outputs[0].finish_reason == "stop"
        assert outputs[1].kv_transfer_params["kv_cache"]["evicted_tokens"] == 225

    def test_json_schema(self, llama, run, text_ids):
        schema = {
            "type": "object",
            "properties": {"lit": {"type": "boolean"}, "keeper": {"enum": ["Hannah", "Tom"]}},
            "required": ["lit", "keeper"],
            "additionalProperties": False,
        }
        params = keep("0.25", num_tokens=60, ignore_eos=False, structured_outputs=StructuredOutputsParams(json=schema))
        # Or random weights would write spaces for ever.
        config = {"backend": "xgrammar", "disable_any_whitespace": True}
        with run(llama, structured_outputs_config=config) as engine:
            (output,) = engine.generate([text_ids[:300]], [params])
        answer = json.loads(output.outputs[0].text)
        assert isinstance(answer["lit"], bool)
        assert answer["keeper"] in ("Hannah", "Tom")

    def test_constrained_tokens_are_the_likeliest_allowed_ones_of_the_reference(
        self, engine, llama_reference, tokenizer, text_ids
    ):
        """The masks meet the compressed context's logits, one row for one request."""
        digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
        grammar = StructuredOutputsParams(regex=r"[0-9]{12}")
        prompts = [text_ids[:300], text_ids[7:307], text_ids[14:314]]
        ratios = ("0.5", "1.0", "0.25")
        constrained = [keep(ratio, num_tokens=12, structured_outputs=grammar) for ratio in ratios]
        # And a neighbour without a grammar.
        outputs = engine.tokens(
            [*prompts[:2], text_ids[21:321], prompts[2]], [*constrained[:2], keep("0.5"), constrained[2]]
        )
        free = outputs.pop(2)
        assert free == llama_reference.generate(text_ids[21:321], 12, "0.5", (0,))
        for prompt, ratio, answer in zip(prompts, ratios, outputs, strict=True):
            # Digits are tokens of their own in this tokenizer.
            assert set(answer) <= set(digits)
            logits = llama_reference.logits(prompt, answer, ratio, (0,))[:, digits]
            assert [digits[i] for i in logits.argmax(-1).tolist()] == answer
