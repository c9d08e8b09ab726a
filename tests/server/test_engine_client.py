"""What compression adds to vLLM's engine client."""

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm import SamplingParams
from vllm.entrypoints.rl.online import api_router as rl
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_l2kv_server.context import Compression, current
from vllm_l2kv_server.engine_client import EngineCalls, wrap_engine_client

from vllm_l2kv.params import CompressionParams

NUMBERS = {"prompt_tokens": 10, "kept_tokens": 5, "evicted_tokens": 5}


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
    (output,) = run(EngineCalls(fake, CompressionParams()), extra_args, compression)
    assert fake.extra_args == {**(extra_args or {}), **fields}
    assert compression.box.total() == NUMBERS
    assert output.kv_transfer_params is None
    assert fake.calls == [("text", "id", {"priority": 3})]


def test_a_field_where_no_numbers_are_reported(fake):
    """Such as in a form, which the middleware does not read."""
    with pytest.raises(VLLMValidationError, match=r"works on POST .*/v1/messages") as caught:
        run(EngineCalls(fake, CompressionParams()), {"kv_keep_ratio": 0.5})
    assert caught.value.parameter == "kv_keep_ratio"
    assert fake.calls == []


def test_server_default_counts_as_asking(fake):
    compression = Compression({})
    run(EngineCalls(fake, CompressionParams(keep_ratio=0.5)), None, compression)
    assert compression.box.total() == NUMBERS


def test_numbers_are_hidden_where_none_are_reported(fake):
    (output,) = run(EngineCalls(fake, CompressionParams(keep_ratio=0.5)), None)
    assert output.kv_transfer_params is None


def test_who_asks_nothing_gets_vllms_generator(fake):
    client = EngineCalls(fake, CompressionParams())
    assert client.generate("text", SamplingParams(), "id") is fake.generated


@pytest.mark.parametrize(
    ("extra_args", "param"),
    [
        ({"kv_keep_ratio": 5}, "kv_keep_ratio"),
        ({"kv_keep": 0.5}, "kv_keep"),
        ({"kv_transfer_params": "x"}, "kv_transfer_params"),
    ],
)
def test_bad_extra_args_never_reach_the_engine(fake, extra_args, param):
    client = EngineCalls(fake, CompressionParams())
    with pytest.raises(VLLMValidationError) as caught:
        client.generate("text", SamplingParams(extra_args=extra_args), "id")
    assert caught.value.parameter == param
    assert fake.calls == []


async def chunks():
    yield "a chunk of the prompt"


@pytest.mark.parametrize(("prompt", "keep_ratio"), [("text", 0.5), (chunks(), 1)])
def test_latencies_of_streaming_input_are_those_of_a_whole_cache(fake, prompt, keep_ratio):
    observed = []
    metrics = SimpleNamespace(observe=lambda outputs, keep_ratio: observed.append(keep_ratio) or outputs)
    client = EngineCalls(fake, CompressionParams(keep_ratio=0.5), metrics)
    client.generate(prompt, SamplingParams(), "id")
    assert observed == [keep_ratio]


class DevelopmentClient(AsyncLLM):
    """vLLM's client without an engine."""

    def __init__(self):
        self.output_processor = SimpleNamespace(request_states={"a": None}, parent_requests={})
        self.output_handler = None
        self.aborted: list[str] = []

    async def abort(self, request_ids, internal=False):
        self.aborted += request_ids

    def __del__(self):
        """There is nothing to shut down."""


def test_the_client_stays_vllms_with_two_methods_changed():
    """`POST /abort_requests`, of vLLM's development mode, asks whether the app's client is an `AsyncLLM`."""
    client = DevelopmentClient()
    calls = wrap_engine_client(client, CompressionParams())
    assert (client.generate, client.shutdown) == (calls.generate, calls.shutdown)
    app = FastAPI()
    app.include_router(rl.router)
    app.state.engine_client = client
    answer = TestClient(app).post("/abort_requests", json={})
    assert answer.json() == {"status": "aborted", "aborted": 1}
    assert client.aborted == ["a"]


class StoppedClient(FakeClient):
    """Leaves its requests waiting, as vLLM's may: its output handler is cancelled before it can tell them."""

    dead_error = RuntimeError("dead")

    def __init__(self):
        super().__init__()
        self.output_processor = SimpleNamespace(propagate_error=self.calls.append)
        self.output_handler: asyncio.Task | None = None


def test_requests_in_flight_hear_of_a_shutdown():
    async def run():
        stopped.output_handler = asyncio.create_task(asyncio.sleep(0))
        client = EngineCalls(stopped, CompressionParams())
        assert not client.was_shut_down
        await asyncio.to_thread(client.shutdown, timeout=3)
        await asyncio.sleep(0)
        assert client.was_shut_down

    stopped = StoppedClient()
    asyncio.run(run())
    assert stopped.calls == [3, stopped.dead_error]


def test_shutdown_before_the_first_request():
    stopped = StoppedClient()
    EngineCalls(stopped, CompressionParams()).shutdown()
    assert stopped.calls == [None]


class FailingClient(FakeClient):
    async def generate(self, prompt, sampling_params, request_id):
        for reason in (None, "error"):
            choice = SimpleNamespace(index=0, token_ids=[1], finish_reason=reason)
            yield SimpleNamespace(kv_transfer_params=None, outputs=[choice])


@pytest.mark.parametrize("extra_args", [None, {"kv_keep_ratio": 0.5}])
def test_an_error_of_a_structured_request_is_the_fault_of_its_grammar(extra_args):
    async def consume(params):
        current.set(Compression({}))
        client = EngineCalls(FailingClient(), CompressionParams())
        return [output async for output in client.generate("text", params, "id")]

    structured = SamplingParams(extra_args=extra_args, structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(VLLMValidationError, match="structured_outputs"):
        asyncio.run(consume(structured))
    assert len(asyncio.run(consume(SamplingParams(extra_args=extra_args)))) == 2
