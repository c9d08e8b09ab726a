"""Numbers: gathered from engine outputs, put into JSON answers and streams."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from vllm_l2kv_server.usage import UsageBox, add_usage, record


def numbers(prompt: int, kept: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "kept_tokens": kept, "evicted_tokens": prompt - kept}


def output(said: dict | None, *choices: int):
    return SimpleNamespace(kv_transfer_params=said, outputs=[SimpleNamespace(index=index) for index in choices or (0,)])


async def generate(outputs, closed=None):
    try:
        for item in outputs:
            yield item
    finally:
        if closed is not None:
            closed.append(True)


def collect(iterator) -> list:
    async def run():
        return [item async for item in iterator]

    return asyncio.run(run())


def filled_box(*prompts: tuple[int, int]) -> UsageBox:
    box = UsageBox()
    for prompt, kept in prompts:
        box.new_prompt()[0] = numbers(prompt, kept)
    return box


class TestBox:
    def test_silent_engine(self):
        box = UsageBox()
        assert box.total() is None
        box.new_prompt()
        assert box.total() is None

    def test_sum_over_prompts(self):
        assert filled_box((10, 5), (4, 3)).total() == numbers(14, 8)

    def test_reasons_follow_each_other_once(self):
        box = UsageBox()
        for reason in ("One.", None, "Two.", "One."):
            box.new_prompt()[0] = {**numbers(10, 10), "reason": reason} if reason else numbers(10, 5)
        assert box.total() == {**numbers(40, 35), "reason": "One. Two."}

    def test_a_reason_goes_with_the_choice_that_counts(self):
        box = UsageBox()
        box.new_prompt().update({0: {**numbers(10, 10), "reason": "One."}, 1: numbers(10, 5)})
        assert box.total() == numbers(10, 5)

    def test_choices_share_a_prompt(self):
        box = UsageBox()
        box.new_prompt().update({0: numbers(10, 10), 1: numbers(10, 5), 2: numbers(10, 5)})
        assert box.total() == numbers(10, 5)


class TestRecord:
    def test_latest_numbers_win_and_leave_the_output(self):
        prompt: dict = {}
        outputs = [output({"kv_cache": numbers(10, kept)}) for kept in (10, 5, 10)]
        assert collect(record(generate(outputs), prompt)) == outputs
        assert prompt == {0: numbers(10, 10)}
        assert [item.kv_transfer_params for item in outputs] == [None] * 3

    def test_by_choice(self):
        prompt: dict = {}
        outputs = [output({"kv_cache": numbers(10, 10)}, 1), output({"kv_cache": numbers(10, 5)}, 0)]
        collect(record(generate(outputs), prompt))
        assert prompt == {0: numbers(10, 5), 1: numbers(10, 10)}

    def test_others_words_stay(self):
        prompt: dict = {}
        outputs = [output(None), output({"theirs": 1})]
        collect(record(generate(outputs), prompt))
        assert prompt == {}
        assert [item.kv_transfer_params for item in outputs] == [None, {"theirs": 1}]

    def test_closing_closes_the_engine_generator_at_once(self):
        closed: list = []

        async def leave_early():
            recorded = record(generate([output(None)] * 3, closed), {})
            await anext(recorded)
            await recorded.aclose()

        asyncio.run(leave_early())
        assert closed == [True]


class TestJSON:
    def test_added(self):
        response = JSONResponse({"id": "ü", "usage": {"prompt_tokens": 10}}, headers={"x": "y"})
        assert add_usage(response, filled_box((10, 5))) is response
        assert json.loads(response.body) == {
            "id": "ü",
            "usage": {"prompt_tokens": 10, "kv_cache": numbers(10, 5)},
        }
        assert response.headers["content-length"] == str(len(response.body))
        assert response.headers["x"] == "y"

    @pytest.mark.parametrize("content", [{"error": {"code": 400}}, {"usage": None}, [1], None])
    def test_nothing_to_add_to(self, content):
        response = JSONResponse(content)
        before = response.body
        add_usage(response, filled_box((10, 5)))
        assert response.body == before

    def test_nothing_to_add(self):
        response = JSONResponse({"usage": {}})
        add_usage(response, UsageBox())
        assert response.body == b'{"usage":{}}'

    def test_other_responses_pass(self):
        response = PlainTextResponse('{"usage":{}}')
        assert add_usage(response, filled_box((10, 5))) is response
        assert response.body == b'{"usage":{}}'
        assert add_usage(None, filled_box((10, 5))) is None


class TestStream:
    def stream(self, events, box):
        async def body():
            for event in events:
                yield event

        return collect(add_usage(StreamingResponse(body()), box).body_iterator)

    def test_only_events_with_usage_change(self):
        events = [
            'data: {"choices":[{"text":"\\"usage\\":{}"}]}\n\n',
            'data: {"choices":[],"usage":null}\n\n',
            ": keep-alive\n\n",
            'data: {"choices":[],"usage":{"prompt_tokens":10}}\n\n',
            "data: [DONE]\n\n",
        ]
        streamed = self.stream(events, filled_box((10, 5)))
        assert streamed[:3] == events[:3]
        assert streamed[4] == events[4]
        assert streamed[3].endswith("\n\n")
        assert json.loads(streamed[3].removeprefix("data: "))["usage"] == {
            "prompt_tokens": 10,
            "kv_cache": numbers(10, 5),
        }

    def test_the_box_is_read_when_the_event_passes(self):
        box = UsageBox()
        prompt = box.new_prompt()

        async def body():
            yield 'data: {"usage":{}}\n\n'
            prompt[0] = numbers(4, 2)
            yield 'data: {"usage":{}}\n\n'

        first, last = collect(add_usage(StreamingResponse(body()), box).body_iterator)
        assert first == 'data: {"usage":{}}\n\n'
        assert '"evicted_tokens":2' in last
