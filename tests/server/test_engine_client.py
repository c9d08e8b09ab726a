"""What compression adds to vLLM's engine client."""

import asyncio
import json
import re
from contextvars import copy_context
from types import SimpleNamespace

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm import SamplingParams
from vllm.entrypoints.rl.online import api_router as rl
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_l2kv_server.context import ChatDocument, Compression, current
from vllm_l2kv_server.engine_client import EngineCalls, check_before_status, wrap_engine_client
from vllm_l2kv_server.fit import FitCheck

from vllm_l2kv.capacity import Capacity, GroupCapacity
from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import Intervals
from vllm_l2kv.settings import Settings

NUMBERS = {"prompt_tokens": 10, "kept_tokens": 5, "evicted_tokens": 5, "compactions": 1, "memory_ratio": 0.6}
MODEL = SimpleNamespace(is_encoder_decoder=False)
INTERVALS = Intervals(64, 16)
CAPACITY = Capacity(num_blocks=20, groups=(GroupCapacity(32, True),), max_model_len=2000)
"""640 rows."""
FIT = FitCheck(MODEL, INTERVALS, CAPACITY)


class FakeClient:
    errored = False

    def __init__(self):
        self.calls: list = []

    def generate(self, *args, **kwargs):
        self.generated = self.outputs(*args, **kwargs)
        return self.generated

    async def outputs(self, prompt, sampling_params, request_id, **kwargs):
        self.calls.append((prompt, request_id, kwargs))
        self.extra_args = sampling_params.extra_args
        yield SimpleNamespace(kv_transfer_params={"kv_cache": NUMBERS}, outputs=[SimpleNamespace(index=0)])

    def shutdown(self, timeout=None):
        self.calls.append(timeout)


@pytest.fixture
def fake() -> FakeClient:
    return FakeClient()


def run(client, extra_args, compression=None):
    async def consume():
        current.set(compression)
        params = SamplingParams(extra_args=extra_args)
        return [output async for output in client.generate("text", params, "id", priority=3)]

    return asyncio.run(consume())


@pytest.mark.parametrize(
    ("fields", "extra_args"),
    [({"kv_keep_ratio": 0.5}, None), ({"kv_keep_ratio": 0.5}, {"other": 1}), ({}, {"kv_keep_ratio": 0.5})],
)
def test_fields_go_to_the_engine_and_numbers_to_the_request(fake, fields, extra_args):
    compression = Compression(fields)
    (output,) = run(EngineCalls(fake, Settings(), FIT), extra_args, compression)
    assert fake.extra_args == {**(extra_args or {}), **fields}
    assert compression.box.total() == NUMBERS
    assert output.kv_transfer_params is None
    assert fake.calls == [("text", "id", {"priority": 3})]


def test_the_end_of_a_chats_document_is_found_in_its_prompt(fake):
    """Each prompt of a request has its own end; without one, or with an error, the request is refused."""
    client = EngineCalls(fake, Settings(), FIT)

    def ask(prompt):
        current.set(Compression({"kv_keep_ratio": 0.5}, ChatDocument(1)))
        params = SamplingParams(max_tokens=8, extra_args={"kv_prefix_messages": 1, "other": 2})
        client.generate(prompt, params, "id")
        return params.extra_args

    for end in (3, 9):
        asked = copy_context().run(ask, {**rendered(10), "kv_prefix_tokens": end})
        assert asked == {"kv_keep_ratio": 0.5, "kv_prefix_tokens": end, "other": 2}
    for prompt, words in [
        (rendered(10), "needs a chat"),
        ({**rendered(10), "kv_prefix_tokens": ParamError("kv_prefix_messages", "Such is life.")}, "Such is life"),
    ]:
        with pytest.raises(VLLMValidationError, match=words) as caught:
            copy_context().run(ask, prompt)
        assert caught.value.parameter == "kv_prefix_messages"


def test_a_field_where_no_numbers_are_reported(fake):
    """For example in a form, which the middleware does not read."""
    with pytest.raises(VLLMValidationError, match=r"works on POST .*/v1/messages") as caught:
        run(EngineCalls(fake, Settings(), FIT), {"kv_keep_ratio": 0.5})
    assert caught.value.parameter == "kv_keep_ratio"
    assert fake.calls == []


def test_a_server_default_requests_compression(fake):
    compression = Compression({})
    run(EngineCalls(fake, Settings(defaults=CompressionParams(keep_ratio=0.5)), FIT), None, compression)
    assert compression.box.total() == NUMBERS


def test_numbers_are_hidden_where_none_are_reported(fake):
    (output,) = run(EngineCalls(fake, Settings(defaults=CompressionParams(keep_ratio=0.5)), FIT), None)
    assert output.kv_transfer_params is None


def test_a_request_without_fields_gets_vllms_generator(fake):
    client = EngineCalls(fake, Settings(), FIT)
    assert client.generate("text", SamplingParams(), "id") is fake.generated


@pytest.mark.parametrize(
    ("extra_args", "param"),
    [
        ({"kv_keep_ratio": 5}, "kv_keep_ratio"),
        ({"kv_keep": 0.5}, "kv_keep"),
        ({"kv_prefix_messages": 1}, "kv_prefix_messages"),
        ({"kv_transfer_params": "x"}, "kv_transfer_params"),
    ],
)
def test_bad_extra_args_never_reach_the_engine(fake, extra_args, param):
    client = EngineCalls(fake, Settings(), FIT)
    with pytest.raises(VLLMValidationError) as caught:
        client.generate("text", SamplingParams(extra_args=extra_args), "id")
    assert caught.value.parameter == param
    assert fake.calls == []


async def chunks():
    yield "a chunk of the prompt"


@pytest.mark.parametrize(("prompt", "keep_ratio"), [("text", 0.5), (chunks(), 1)])
def test_latencies_of_streaming_input_are_those_of_a_whole_cache(fake, prompt, keep_ratio):
    observed = []
    metrics = SimpleNamespace(observe=lambda outputs, params: observed.append(params) or outputs)
    client = EngineCalls(fake, Settings(defaults=CompressionParams(keep_ratio=0.5)), FIT, metrics)
    client.generate(prompt, SamplingParams(), "id")
    assert observed == [CompressionParams(keep_ratio)]


def rendered(num_tokens: int) -> dict:
    return tokens_input([7] * num_tokens)


def generate(client, prompt, max_tokens, fields=None):
    """Returns the client's generator for a request with these fields, before it is started."""

    def call():
        current.set(Compression(fields or {}))
        return client.generate(prompt, SamplingParams(max_tokens=max_tokens), "id")

    return copy_context().run(call)


class TestFit:
    """The cache holds 640 rows of the one group, which is compressed."""

    @pytest.mark.parametrize(
        ("prompt", "max_tokens", "fields"),
        [
            (rendered(600), 41, {}),
            (rendered(600), None, {}),  # it gets what fits
            (rendered(600), 1400, {}),  # the rest of the context, which vLLM sets without a bound
            (rendered(1900), 100, {"kv_max_tokens": 576}),
            (rendered(1900), 100, {"kv_max_tokens": 500, "kv_keep_ratio": 0.01}),
            ({"type": "embeds", "prompt_embeds": torch.zeros(600, 4)}, 41, {}),
            ("as text", 5000, {}),
            ({"prompt_token_ids": [7] * 5000}, 41, {}),
            (chunks(), 5000, {}),
        ],
    )
    def test_a_prompt_that_fits_or_that_the_engine_checks(self, fake, prompt, max_tokens, fields):
        assert generate(EngineCalls(fake, Settings(), FIT), prompt, max_tokens, fields)

    @pytest.mark.parametrize(
        ("num_tokens", "max_tokens", "fields", "param", "words"),
        [
            (600, 42, {}, "max_tokens", "max_tokens may be at most 41 here. Set kv_max_tokens, or lower max_tokens."),
            (641, 8, {}, "kv_max_tokens", "no kv_max_tokens needs 21 blocks of the KV cache, which has 20; not even"),
            (641, None, {}, "kv_max_tokens", "not even one token of an answer fits. Set kv_max_tokens."),
            (1900, 100, {"kv_max_tokens": 577}, "kv_max_tokens", "Lower kv_max_tokens."),
            (1900, 9, {"kv_keep_ratio": 0.01}, "kv_max_tokens", "no kv_max_tokens needs 60 blocks"),
        ],
    )
    def test_a_prompt_that_never_fits(self, fake, num_tokens, max_tokens, fields, param, words):
        """The call itself raises, before a status is sent, and nothing reaches the engine."""
        client = EngineCalls(fake, Settings(), FIT)
        with pytest.raises(VLLMValidationError, match=re.escape(words)) as caught:
            generate(client, rendered(num_tokens), max_tokens, fields)
        assert caught.value.parameter == param
        assert not hasattr(fake, "generated")

    @pytest.mark.parametrize(("num_tokens", "document"), [(10, 10), (10, 11), (1, 1)])
    @pytest.mark.parametrize("others", [{}, {"kv_keep_ratio": 0.5}, {"kv_max_tokens": 100}])
    def test_nothing_follows_the_document(self, fake, num_tokens, document, others):
        """Also for a request that keeps everything: its client would believe that the document is shared."""
        client = EngineCalls(fake, Settings(), FIT)
        words = f"less than the prompt's {num_tokens} tokens, got {document}; at least one token must follow"
        with pytest.raises(VLLMValidationError, match=words) as caught:
            generate(client, rendered(num_tokens), 8, {"kv_prefix_tokens": document, **others})
        assert caught.value.parameter == "kv_prefix_tokens"
        assert not hasattr(fake, "generated")
        assert generate(client, rendered(document + 1), 8, {"kv_prefix_tokens": document, **others})

    def test_a_default_budget_counts(self, fake):
        assert generate(
            EngineCalls(fake, Settings(defaults=CompressionParams(max_tokens=500)), FIT), rendered(1900), 100
        )

    def test_capacity_travels_as_plain_data(self):
        capacity = Capacity(7, (GroupCapacity(32, True), GroupCapacity(448, False, 3)), 1000, 2)
        assert Capacity.from_plain(json.loads(json.dumps(capacity.as_plain()))) == capacity

    def test_the_responses_api_checks_before_it_begins(self, fake):
        """It makes the generator before the status, but calls the engine with the first output, after the status."""

        async def generate(request_id, engine_input, sampling_params, context):
            yield request_id, context

        responses = SimpleNamespace(_generate_with_builtin_tools=generate)
        check_before_status(responses, EngineCalls(fake, Settings(), FIT))

        async def ask(num_tokens):
            prompt, params = rendered(num_tokens), SamplingParams(max_tokens=8)
            outputs = responses._generate_with_builtin_tools(
                request_id="id", engine_input=prompt, sampling_params=params, context="c"
            )
            return [output async for output in outputs]

        assert asyncio.run(ask(600)) == [("id", "c")]
        prompt = {"request_id": "id", "engine_input": rendered(641), "sampling_params": SamplingParams(), "context": 0}
        with pytest.raises(VLLMValidationError, match="not even one token"):
            responses._generate_with_builtin_tools(**prompt)

        def with_document():
            current.set(Compression({"kv_prefix_tokens": 9}))
            responses._generate_with_builtin_tools(**{**prompt, "engine_input": rendered(9)})

        with pytest.raises(VLLMValidationError, match="must follow the document"):
            copy_context().run(with_document)


class DevelopmentClient(AsyncLLM):
    """vLLM's client class without an engine."""

    def __init__(self):
        self.output_processor = SimpleNamespace(request_states={"a": None}, parent_requests={})
        self.output_handler = None
        self.aborted: list[str] = []

    async def abort(self, request_ids, internal=False):
        self.aborted += request_ids

    def __del__(self):
        """Does nothing, since there is nothing to shut down."""


def test_the_client_is_vllms_object_with_two_methods_replaced():
    """`POST /abort_requests`, in vLLM's development mode, checks that the app's client is an `AsyncLLM`."""
    client = DevelopmentClient()
    calls = wrap_engine_client(client, Settings(), FIT)
    assert (client.generate, client.shutdown) == (calls.generate, calls.shutdown)
    app = FastAPI()
    app.include_router(rl.router)
    app.state.engine_client = client
    answer = TestClient(app).post("/abort_requests", json={})
    assert answer.json() == {"status": "aborted", "aborted": 1}
    assert client.aborted == ["a"]


class StoppedClient(FakeClient):
    """Leaves its requests waiting, as vLLM's client may: its output handler is cancelled before it can end them."""

    dead_error = RuntimeError("dead")

    def __init__(self):
        super().__init__()
        self.output_processor = SimpleNamespace(propagate_error=self.calls.append)
        self.output_handler: asyncio.Task | None = None


def test_a_shutdown_ends_requests_in_flight():
    async def run():
        stopped.output_handler = asyncio.create_task(asyncio.sleep(0))
        client = EngineCalls(stopped, Settings(), FIT)
        assert not client.was_shut_down
        await asyncio.to_thread(client.shutdown, timeout=3)
        await asyncio.sleep(0)
        assert client.was_shut_down

    stopped = StoppedClient()
    asyncio.run(run())
    assert stopped.calls == [3, stopped.dead_error]


def test_shutdown_before_the_first_request():
    stopped = StoppedClient()
    EngineCalls(stopped, Settings(), FIT).shutdown()
    assert stopped.calls == [None]


class FailingClient(FakeClient):
    async def generate(self, prompt, sampling_params, request_id):
        for reason in (None, "error"):
            choice = SimpleNamespace(index=0, token_ids=[1], finish_reason=reason)
            yield SimpleNamespace(kv_transfer_params=None, outputs=[choice])


@pytest.mark.parametrize("extra_args", [None, {"kv_keep_ratio": 0.5}])
def test_an_error_of_a_structured_request_is_reported_as_a_bad_grammar(extra_args):
    async def consume(params):
        current.set(Compression({}))
        client = EngineCalls(FailingClient(), Settings(), FIT)
        return [output async for output in client.generate("text", params, "id")]

    structured = SamplingParams(extra_args=extra_args, structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(VLLMValidationError, match="structured_outputs"):
        asyncio.run(consume(structured))
    assert len(asyncio.run(consume(SamplingParams(extra_args=extra_args)))) == 2
