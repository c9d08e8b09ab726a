"""The client that stands before vLLM's."""

import asyncio
from types import SimpleNamespace

import pytest
from starlette.datastructures import State
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm_l2kv_server.context import Compression, current
from vllm_l2kv_server.engine_client import CompressionEngineClient, stand_before

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


@pytest.fixture
def fake() -> FakeClient:
    return FakeClient()


def run(client, extra_args, compression=None):
    async def consume():
        current.set(compression)
        params = SamplingParams(extra_args=extra_args)
        return [output async for output in client.generate("text", params, "id", priority=3)]

    return asyncio.run(consume())


def test_everything_else_is_vllms(fake):
    client = CompressionEngineClient(fake, CompressionParams())
    assert client.errored is False
    assert client.calls is fake.calls
    with pytest.raises(AttributeError):
        _ = client.no_such_thing


@pytest.mark.parametrize(
    ("fields", "extra_args"),
    [({"kv_keep_ratio": 0.5}, None), ({"kv_keep_ratio": 0.5}, {"other": 1}), ({}, {"kv_keep_ratio": 0.5})],
)
def test_fields_go_to_the_engine_and_numbers_to_the_request(fake, fields, extra_args):
    compression = Compression(fields)
    (output,) = run(CompressionEngineClient(fake, CompressionParams()), extra_args, compression)
    assert fake.extra_args == {**(extra_args or {}), **fields}
    assert compression.box.total() == NUMBERS
    assert output.kv_transfer_params is None
    assert fake.calls == [("text", "id", {"priority": 3})]


def test_a_field_where_no_numbers_are_reported(fake):
    """Such as in a form, which the middleware does not read."""
    with pytest.raises(VLLMValidationError, match=r"works on POST .*/v1/messages") as caught:
        run(CompressionEngineClient(fake, CompressionParams()), {"kv_keep_ratio": 0.5})
    assert caught.value.parameter == "kv_keep_ratio"
    assert fake.calls == []


def test_server_default_counts_as_asking(fake):
    compression = Compression({})
    run(CompressionEngineClient(fake, CompressionParams(keep_ratio=0.5)), None, compression)
    assert compression.box.total() == NUMBERS


def test_numbers_are_hidden_where_none_are_reported(fake):
    (output,) = run(CompressionEngineClient(fake, CompressionParams(keep_ratio=0.5)), None)
    assert output.kv_transfer_params is None


def test_who_asks_nothing_gets_vllms_generator(fake):
    client = CompressionEngineClient(fake, CompressionParams())
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
    client = CompressionEngineClient(fake, CompressionParams())
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
    client = CompressionEngineClient(fake, CompressionParams(keep_ratio=0.5), metrics)
    client.generate(prompt, SamplingParams(), "id")
    assert observed == [keep_ratio]


def test_stands_before_the_client_of_every_serving_object(fake):
    other = object()
    state = State(
        {
            "engine_client": fake,
            "chat": SimpleNamespace(engine_client=fake),
            "other": SimpleNamespace(engine_client=other),
            "nothing": None,
        }
    )
    stand_before(fake, state, CompressionParams())
    assert type(state.chat.engine_client) is CompressionEngineClient
    assert state.other.engine_client is other
    assert state.engine_client is state.chat.engine_client  # it must hear when the server is told to stop
    assert isinstance(state.engine_client, FakeClient)  # some routes of vLLM ask


class StoppedClient(FakeClient):
    """Leaves its requests waiting, as vLLM's may: its output handler is cancelled before it can tell them."""

    dead_error = RuntimeError("dead")

    def __init__(self):
        super().__init__()
        self.output_processor = SimpleNamespace(propagate_error=self.calls.append)
        self.output_handler: asyncio.Task | None = None

    def shutdown(self, timeout=None):
        self.calls.append(timeout)


def test_requests_in_flight_hear_of_a_shutdown():
    async def run():
        stopped.output_handler = asyncio.create_task(asyncio.sleep(0))
        client = CompressionEngineClient(stopped, CompressionParams())
        assert not client.told_to_stop
        await asyncio.to_thread(client.shutdown, timeout=3)
        await asyncio.sleep(0)
        assert client.told_to_stop

    stopped = StoppedClient()
    asyncio.run(run())
    assert stopped.calls == [3, stopped.dead_error]


def test_shutdown_before_the_first_request():
    stopped = StoppedClient()
    CompressionEngineClient(stopped, CompressionParams()).shutdown()
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
        client = CompressionEngineClient(FailingClient(), CompressionParams())
        return [output async for output in client.generate("text", params, "id")]

    structured = SamplingParams(extra_args=extra_args, structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(VLLMValidationError, match="structured_outputs"):
        asyncio.run(consume(structured))
    assert len(asyncio.run(consume(SamplingParams(extra_args=extra_args)))) == 2
