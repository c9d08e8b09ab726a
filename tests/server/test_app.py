"""The plugin inside vLLM's app, with a fake engine behind vLLM's real routes and error handlers."""

import asyncio
import json
from argparse import Namespace
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from usages import together
from vllm.entrypoints.anthropic import api_router as messages
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.entrypoints.scale_out.token_in_token_out import api_router as tokens
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.tokenize import api_router as tokenize
from vllm.envs import disable_envs_cache
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin, attach_endpoint_plugins
from vllm_l2kv_server.app import KVCompressionEndpoints
from vllm_l2kv_server.last_line import Outcome
from vllm_l2kv_server.request_fields import CHAT_PATHS, GENERATING_PATHS

from vllm_l2kv.capacity import Capacity, GroupCapacity
from vllm_l2kv.params import FIELD_NAMES, OFFERED_SCORERS, CompressionParams
from vllm_l2kv.settings import Settings

GROUPS = [{"layers": ["a", "b"], "block_size": 32, "compressed": True, "sliding_window": None}]
CAPACITY = Capacity(num_blocks=10, groups=(GroupCapacity(32, True),), max_model_len=1000)
ARGS = Namespace(log_error_stack=False, max_body_mib=1)
NUMBERS = {"prompt_tokens": 10, "kept_tokens": 5, "evicted_tokens": 5, "compactions": 1, "memory_ratio": 0.6}


def of_ranks(groups) -> list[list[dict]]:
    """Reports of two pipeline ranks with two tensor-parallel ranks each: the same groups, with their own layers."""
    halves = [
        [{**group, "layers": group["layers"][:1]} for group in groups],
        [{**group, "layers": group["layers"][1:]} for group in groups],
    ]
    return [rank for rank in halves for _ in range(2)]


class FakeClient:
    """Answers every request as a compressing engine would."""

    def __init__(self, defaults: CompressionParams, groups=GROUPS):
        self.vllm_config = SimpleNamespace(
            additional_config={"l2kv": Settings((0, 1), defaults=defaults).as_config()},
            parallel_config=SimpleNamespace(_api_process_rank=1),
            model_config=SimpleNamespace(is_encoder_decoder=False),
        )
        self.groups = groups
        self.renderer = SimpleNamespace(render_chat_async=None)
        self.logger_manager = None  # as with --disable-log-stats

    async def collective_rpc(self, method):
        if self.groups is None:
            raise AttributeError(method)
        return {"kv_cache_groups": of_ranks(self.groups), "kv_capacity": [CAPACITY.as_plain()] * 4}[method]

    async def generate(self, prompt, sampling_params, request_id):
        yield SimpleNamespace(kv_transfer_params={"kv_cache": NUMBERS}, outputs=[SimpleNamespace(index=0)])

    def shutdown(self, timeout=None):
        """Does nothing."""


class FakeServing:
    """Replaces vLLM's serving objects: calls the engine in the handler, and reads numbers later."""

    def __init__(self, engine_client):
        self.engine_client = engine_client

    async def create_completion(self, request, raw_request):
        prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        params = request.to_sampling_params(8, {})
        generators = [self.engine_client.generate(prompt, params, str(i)) for i, prompt in enumerate(prompts)]
        if request.stream:
            return self.stream(generators)
        for generator in generators:
            async for output in generator:
                assert output.kv_transfer_params is None or not params.extra_args
        return CompletionResponse(model="m", choices=[], usage=UsageInfo(prompt_tokens=10))

    async def create_chat_completion(self, request, raw_request):
        json.loads(request.messages[0]["tool_calls"][0]["function"]["arguments"])

    async def stream(self, generators):
        for generator in generators:
            async for _ in generator:
                yield 'data: {"choices":[{"text":"a"}]}\n\n'
        yield 'data: {"choices":[],"usage":{"prompt_tokens":10}}\n\n'
        yield "data: [DONE]\n\n"


def make_app(monkeypatch, keep_ratio=1.0, groups=GROUPS, args=ARGS) -> FastAPI:
    # An engine of another test in this process makes vLLM cache the environment of its start.
    disable_envs_cache()
    monkeypatch.setenv("VLLM_PLUGINS", "l2kv")
    app = FastAPI()
    app.state.args = Namespace(**vars(args), outcome=Outcome())
    app.include_router(chat.router)
    app.include_router(completion.router)
    for other in (responses, messages, tokens, tokenize):
        app.include_router(other.router)
    attach_endpoint_plugins(app, ("generate",))
    init_exception_handler(app)
    client = FakeClient(CompressionParams(keep_ratio), groups)
    app.state.engine_client = client
    app.state.openai_serving_models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="m")])
    app.state.openai_serving_completion = FakeServing(client)
    app.state.openai_serving_chat = FakeServing(client)
    (plugin,) = app.state.endpoint_plugins
    asyncio.run(plugin.init_state(client, app.state, app.state.args))
    return app


@pytest.fixture
def app(monkeypatch) -> FastAPI:
    return make_app(monkeypatch)


def request(app, method, path, **kwargs) -> httpx.Response:
    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(run())


def complete(app, **body) -> httpx.Response:
    return request(app, "POST", "/v1/completions", json={"model": "m", "prompt": "hello", **body})


def test_obeys_the_protocol():
    assert isinstance(KVCompressionEndpoints(), EndpointPlugin)


def test_routes_replace_vllms(app):
    owners = {route.path: route.endpoint.__module__ for route in app.routes if "POST" in getattr(route, "methods", ())}
    assert owners["/v1/chat/completions"] == "vllm_l2kv_server.routes"
    assert owners["/v1/completions"] == "vllm_l2kv_server.routes"
    assert owners["/v1/chat/completions/batch"] == "vllm.entrypoints.openai.chat_completion.api_router"


def test_openapi_shows_the_fields_at_every_endpoint(app):
    spec = request(app, "GET", "/openapi.json").json()
    for path in GENERATING_PATHS:
        if path == "/invocations":  # takes the body of any endpoint, and vLLM has no schema for it
            continue
        content = spec["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = content["schema"]["$ref"].rsplit("/", 1)[-1]
        properties = spec["components"]["schemas"][name]["properties"]
        expected = tuple(name for name in FIELD_NAMES if name != "kv_prefix_messages" or path in CHAT_PATHS)
        assert tuple(field for field in properties if field in FIELD_NAMES) == expected
        assert properties["kv_keep_ratio"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
        assert properties["kv_protect_last"]["anyOf"][0]["type"] == "integer"
        assert properties["kv_granularity"]["anyOf"][0]["enum"] == ["token", "neighbors", "block"]
        assert "every compaction keeps" in properties["kv_protect_first"]["description"]
        assert properties["kv_max_tokens"]["anyOf"][0]["minimum"] == 1
        assert properties["kv_prefix_tokens"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
    assert "kv_keep_ratio" not in json.dumps(spec["components"]["schemas"]["TokenizeCompletionRequest"])


def test_usage_is_added(app):
    response = complete(app, kv_keep_ratio=0.5)
    assert response.json()["usage"]["kv_cache"] == NUMBERS
    assert response.json()["kv_transfer_params"] is None


def test_a_body_that_the_middleware_parsed_is_not_parsed_again(app, monkeypatch):
    monkeypatch.setattr("vllm_l2kv_server.body.parse_body", None)
    assert complete(app, kv_keep_ratio=0.5).status_code == 200


def test_usage_sums_prompts(app):
    usage = complete(app, prompt=["a", "b", "c"], kv_keep_ratio=0.5).json()["usage"]
    assert usage["kv_cache"] == together([NUMBERS] * 3)


def test_usage_in_the_stream(app):
    events = complete(app, kv_keep_ratio=0.5, stream=True).text.split("\n\n")
    assert json.loads(events[1].removeprefix("data: "))["usage"]["kv_cache"] == NUMBERS
    assert events[-2:] == ["data: [DONE]", ""]


def test_nothing_is_added_without_a_field(app):
    assert "kv_cache" not in complete(app).json()["usage"]


def test_a_server_default_requests_compression(monkeypatch):
    app = make_app(monkeypatch, keep_ratio=0.5)
    assert complete(app).json()["usage"]["kv_cache"] == NUMBERS
    # Engine requests of a beam search are steps of one token, not prompts.
    assert "kv_cache" not in complete(app, use_beam_search=True).json()["usage"]


@pytest.mark.parametrize("value", ["NaN", "1e400", "1" + "0" * 400, "1" + "0" * 5000, '"\\u00e9"', "[[]]"])
def test_bad_value_is_400_in_openais_shape(app, value):
    body = f'{{"model": "m", "prompt": "a", "kv_keep_ratio": {value}}}'
    response = request(app, "POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == ("kv_keep_ratio", 400, "BadRequestError")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 100_000, rb'{"model": "\ud800"}', b"[1]", b"null", b'{"prompt": 1e999}']
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_malformed_body_is_400_in_openais_shape(app, path, body):
    response = request(app, "POST", path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == 400


def test_deep_arguments_of_a_tool_call_are_a_bad_request(app):
    function = {"name": "f", "arguments": "[" * 100_000}
    call = {"id": "c", "type": "function", "function": function}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    response = request(app, "POST", "/v1/chat/completions", json={"model": "m", "messages": messages})
    assert response.status_code == 400
    assert "arguments of a tool call" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch"])
def test_a_long_body_is_413_in_openais_shape(app, path):
    body = b'{"prompt": "' + b"x" * 2**20 + b'"}'
    response = request(app, "POST", path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == 413


def test_a_long_body_is_413_in_anthropics_shape(app):
    response = request(app, "POST", "/v1/messages", content=b"x" * (2**20 + 1))
    assert response.status_code == 413
    assert response.json()["type"] == "error"


def test_vllm_serve_has_the_default_bound(monkeypatch):
    app = make_app(monkeypatch, args=Namespace(log_error_stack=False))
    assert complete(app, prompt="x" * 2**21).status_code == 200


@pytest.mark.parametrize(
    ("errored", "was_shut_down", "lost"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_shutdown_is_bounded_and_records_its_cause(app, errored, was_shut_down, lost):
    state = app.state
    state.server = SimpleNamespace(config=SimpleNamespace(timeout_graceful_shutdown=None))

    async def live():
        async with app.router.lifespan_context(app):
            assert 0 < state.server.config.timeout_graceful_shutdown <= 10
            state.kv_engine_calls.was_shut_down = was_shut_down
            state.engine_client.errored = errored

    asyncio.run(live())
    assert state.args.outcome.engine_lost is lost


def test_only_json_is_accepted(app):
    body = '{"model": "m", "prompt": "a"}'
    response = request(app, "POST", "/v1/completions", content=body, headers={"content-type": "text/plain"})
    assert response.status_code == 400


def test_misplaced_field(app):
    response = request(app, "POST", "/tokenize", json={"prompt": "a", "kv_keep_ratio": 0.5})
    assert response.json()["error"]["param"] == "kv_keep_ratio"


def test_slash_at_the_end_is_redirected_as_by_vllm(app):
    body = {"model": "m", "prompt": "a"}
    for fields in ({}, {"kv_keep_ratio": 0.5}):
        response = request(app, "POST", "/v1/completions/", json={**body, **fields})
        assert response.status_code == 307
        assert response.headers["location"].endswith("/v1/completions")


def test_info(app):
    info = request(app, "GET", "/v1/kv_compression").json()
    fields = info.pop("fields")
    intervals = {"prompt_interval": 2048, "answer_interval": 256}
    assert info == {"models": ["m"], "full_layers": [0, 1], "full_heads": {}, **intervals, "kv_cache_groups": GROUPS}
    assert [field["name"] for field in fields] == list(FIELD_NAMES)
    shown = ("kv_keep_ratio", "kv_max_tokens", "kv_protect_last", "kv_scorer", "kv_prefix_messages")
    of_each_type = [field for field in fields if field["name"] in shown]
    assert of_each_type == [
        {
            "name": "kv_keep_ratio",
            "type": "number",
            "default": 1.0,
            "bounds": "0 < kv_keep_ratio <= 1",
            "description": "Share of the prompt's tokens whose KV is kept in compressed layers; 1 keeps everything.",
        },
        {
            "name": "kv_max_tokens",
            "type": "integer",
            "default": None,
            "bounds": "1 <= kv_max_tokens <= 2147483647",
            "description": "Most rows that each head of a compressed layer keeps at a compaction, in the prompt and in "
            "the answer.",
        },
        {
            "name": "kv_protect_last",
            "type": "integer",
            "default": 64,
            "bounds": "0 <= kv_protect_last <= 2147483647",
            "description": "Tokens at the end, of the prompt and later of the answer, that every compaction keeps.",
        },
        {
            "name": "kv_scorer",
            "type": "string",
            "default": "l2",
            "bounds": f"one of {', '.join(name for name in OFFERED_SCORERS if name != 'learned')}",  # has no profile
            "description": "How the other tokens are ranked; l2 keeps the keys of lowest norm.",
        },
        {
            "name": "kv_prefix_messages",
            "type": "integer",
            "default": None,
            "bounds": "1 <= kv_prefix_messages <= 2147483647",
            "description": "Messages at the start of a chat that are a document; the server computes kv_prefix_tokens "
            "from them.",
        },
    ]


def test_an_engine_without_our_worker_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="vllm-l2kv serve"):
        make_app(monkeypatch, groups=None)
