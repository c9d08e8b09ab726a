"""Numbers: collected from engine outputs, and added to JSON answers and event streams."""

import asyncio
import itertools
import json
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from usages import usage
from vllm_l2kv_server.usage import UsageBox, UsageWriter, record


def numbers(prompt: int, kept: int) -> dict[str, Any]:
    return usage(prompt, 1, prompt - kept, full_share=Fraction(1, 4))


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
        assert filled_box((10, 5), (4, 3)).total() == {**numbers(14, 8), "compactions": 2}

    def test_memory_is_that_of_all_prompts_together(self):
        """A long prompt that holds half, and a short uncompressed one: 312.5 of 500 tokens, and 10 of 10."""
        total = filled_box((500, 250), (10, 10)).total()
        assert total["memory_ratio"] == 0.6324 == round((125 + 0.75 * 250 + 10) / 510, 4)

    def test_found_tokens_are_summed_where_reported(self):
        box = UsageBox()
        for found in (None, 70, 0, 50):
            box.new_prompt()[0] = numbers(10, 5) if found is None else {**numbers(10, 5), "found_tokens": found}
        assert box.total() == {**numbers(40, 20), "compactions": 4, "found_tokens": 120}
        box = UsageBox()
        box.new_prompt()[0] = {**numbers(10, 5), "found_tokens": 0}
        assert box.total() == {**numbers(10, 5), "found_tokens": 0}, "a document that was not found"

    def test_each_distinct_reason_is_listed_once(self):
        box = UsageBox()
        for reason in ("One.", None, "Two.", "One."):
            box.new_prompt()[0] = {**numbers(10, 10), "reason": reason} if reason else numbers(10, 5)
        assert box.total() == {**numbers(40, 35), "reason": "One. Two."}

    def test_the_smallest_bound_counts(self):
        box = UsageBox()
        for bound in (None, 70, 50, 60):
            box.new_prompt()[0] = {**numbers(10, 10), "max_tokens": bound} if bound else numbers(10, 10)
        assert box.total() == {**numbers(40, 40), "max_tokens": 50}

    def test_a_reason_goes_with_the_choice_that_counts(self):
        box = UsageBox()
        box.new_prompt().update({0: {**numbers(10, 10), "reason": "One."}, 1: numbers(10, 5)})
        assert box.total() == numbers(10, 5)

    def test_choices_share_a_prompt(self):
        box = UsageBox()
        box.new_prompt().update({0: numbers(10, 10), 1: numbers(10, 5), 2: numbers(10, 5)})
        assert box.total() == numbers(10, 5)

    def test_the_longest_of_those_that_evicted_most_counts(self):
        choices = [{**numbers(10, 4), "kept_tokens": kept} for kept in (4, 9, 7)]
        box = UsageBox()
        box.new_prompt().update(enumerate([numbers(10, 5), *choices]))
        assert box.total() == choices[1]


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

    def test_other_fields_stay(self):
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


def written(messages, box, stored=None) -> list:
    """Returns the part of an answer that reaches the client."""
    sent: list = []

    async def send(message):
        sent.append(message)

    async def run():
        writer = UsageWriter(send, box, stored)
        for message in messages:
            await writer(message)

    asyncio.run(run())
    return sent


def start_of(media_type: str, **headers: str) -> dict:
    headers = {"content-type": media_type, **headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": 200, "headers": raw}


def bodies(*chunks: bytes) -> list[dict]:
    return [
        {"type": "http.response.body", "body": chunk, "more_body": i < len(chunks)}
        for i, chunk in enumerate(chunks, start=1)
    ]


class TestJSON:
    def answer(self, body: bytes, box, *, cuts=(), media_type="application/json", stored=None):
        edges = [0, *cuts, len(body)]
        chunks = [body[a:b] for a, b in itertools.pairwise(edges)]
        start, *rest = written(
            [start_of(media_type, **{"content-length": "0", "x": "y"}), *bodies(*chunks)], box, stored
        )
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        assert headers["x"] == "y"
        whole = b"".join(message["body"] for message in rest)
        assert headers["content-length"] in ("0", str(len(whole)))
        return whole

    @pytest.mark.parametrize("cuts", [(), (4,), (1, 30, 31)])
    def test_added(self, cuts):
        body = '{"id":"\u00fc","usage":{"prompt_tokens":10}}'.encode()
        assert json.loads(self.answer(body, filled_box((10, 5)), cuts=cuts)) == {
            "id": "\u00fc",
            "usage": {"prompt_tokens": 10, "kv_cache": numbers(10, 5)},
        }

    @pytest.mark.parametrize(
        "body", [b'{"error":{"code":400}}', b'{"usage":null}', b"[1]", b"null", b'{"usage": {', b""]
    )
    def test_nothing_to_add_to(self, body):
        assert self.answer(body, filled_box((10, 5))) == body

    def test_nothing_to_add(self):
        assert self.answer(b'{"usage":{}}', UsageBox()) == b'{"usage":{}}'

    @pytest.mark.parametrize("media_type", ["text/plain", "application/octet-stream"])
    def test_other_answers_pass(self, media_type):
        body = b'{"usage":{}}'
        messages = [start_of(media_type), *bodies(body[:3], body[3:])]
        assert written(messages, filled_box((10, 5))) == messages

    def test_a_stored_response_is_recorded(self):
        stored: dict = {}
        box = UsageBox()
        self.answer(b'{"id":"resp_1","object":"response","usage":null}', box, stored=stored)
        self.answer(b'{"id":"other","object":"chat.completion","usage":{}}', box, stored=stored)
        assert stored == {"resp_1": box}


class TestStream:
    def stream(self, chunks: list[bytes], box) -> list[bytes]:
        start, *rest = written([start_of("text/event-stream; charset=utf-8"), *bodies(*chunks, b"")], box)
        assert start == start_of("text/event-stream; charset=utf-8")
        return [message["body"] for message in rest[:-1]]

    def test_only_events_with_usage_change(self):
        events = [
            b'data: {"choices":[{"text":"\\"usage\\":{} data: {}"}]}\n\n',
            b'data: {"choices":[],"usage":null}\n\n',
            b": keep-alive\n\n",
            b'data: {"choices":[],"usage":{"prompt_tokens":10}}\n\n',
            b"data: [DONE]\n\n",
        ]
        streamed = self.stream(events, filled_box((10, 5)))
        assert streamed[:3] == events[:3]
        assert streamed[4] == events[4]
        assert json.loads(streamed[3].removeprefix(b"data: "))["usage"] == {
            "prompt_tokens": 10,
            "kv_cache": numbers(10, 5),
        }
        assert streamed[3].endswith(b"}\n\n")

    def test_events_with_a_name(self):
        """As in the APIs of responses and of messages."""
        events = [
            b'event: response.completed\ndata: {"response":{"usage":{"input_tokens":10}}}\n\n',
            b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":1}}\n\n',
        ]
        completed, delta = self.stream(events, filled_box((10, 5)))
        assert completed.startswith(b"event: response.completed\ndata: {")
        data = json.loads(completed.split(b"\ndata: ")[1])
        assert data["response"]["usage"]["kv_cache"] == numbers(10, 5)
        assert json.loads(delta.split(b"\ndata: ")[1])["usage"]["kv_cache"] == numbers(10, 5)

    def test_events_in_pieces(self):
        whole = b'data: {"text":"a"}\n\ndata: {"usage":{"prompt_tokens":10}}\n\ndata: [DONE]\n\n'
        (expected,) = self.stream([whole], filled_box((10, 5)))
        assert b"kv_cache" in expected
        for size in (1, 7, 30):
            pieces = [whole[begin : begin + size] for begin in range(0, len(whole), size)]
            assert b"".join(self.stream(pieces, filled_box((10, 5)))) == expected

    def test_an_event_is_sent_as_soon_as_it_is_complete(self):
        sent = self.stream([b"data: 1\n", b"\ndata: 2\n\nda", b"ta: 3\n\n"], UsageBox())
        assert sent == [b"", b"data: 1\n\ndata: 2\n\n", b"data: 3\n\n"]

    def test_a_stream_that_breaks_off_loses_nothing(self):
        messages = [start_of("text/event-stream"), *bodies(b"data: 1\n\ndata: {", b"")]
        assert b"".join(message["body"] for message in written(messages, UsageBox())[1:]) == b"data: 1\n\ndata: {"

    def test_the_box_is_read_when_the_event_passes(self):
        box = UsageBox()
        prompt = box.new_prompt()
        sent: list = []

        async def send(message):
            sent.append(message.get("body"))

        async def run():
            writer = UsageWriter(send, box)
            await writer(start_of("text/event-stream"))
            await writer({"type": "http.response.body", "body": b'data: {"usage":{}}\n\n', "more_body": True})
            prompt[0] = numbers(4, 2)
            await writer({"type": "http.response.body", "body": b'data: {"usage":{}}\n\n', "more_body": True})

        asyncio.run(run())
        assert sent[1] == b'data: {"usage":{}}\n\n'
        assert b'"evicted_tokens":2' in sent[2]
