"""Bodies of every method and media type, in any chunks, pass the middleware; answers have numbers."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from vllm_l2kv_server.body import PARSED
from vllm_l2kv_server.context import current
from vllm_l2kv_server.middleware import CompressionMiddleware
from vllm_l2kv_server.usage import UsageBox

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.settings import Settings

JSON = {"content-type": "application/json"}
DEEP = b'{"a":' * 600 + b"1" + b"}" * 600
NUMBERS = {"prompt_tokens": 10, "kept_tokens": 5, "evicted_tokens": 5, "compactions": 1, "memory_ratio": 0.6}


async def echo(scope, receive, send):
    """Sends received chunks back, each with its length."""
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for chunk in chunks:
        await send({"type": "http.response.body", "body": b"%d:%b;" % (len(chunk), chunk), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def generate(scope, receive, send):
    """Answers with usage, like an endpoint whose engine reports numbers."""
    compression = current.get()
    if compression is not None:
        compression.box.new_prompt()[0] = NUMBERS
    body = json.dumps({"object": "response", "id": "resp_1", "usage": {"input_tokens": 10}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def ask(path: str, content, app=echo, method="POST", headers=JSON, root_path: str = "", **state) -> httpx.Response:
    async def with_state(scope, receive, send):
        scope["app"] = SimpleNamespace(state=SimpleNamespace(**state))
        await CompressionMiddleware(app)(scope, receive, send)

    async def run():
        transport = httpx.ASGITransport(with_state, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, content=content, headers=headers)

    return asyncio.run(run())


async def chunks_of(*parts: bytes):
    for part in parts:
        yield part


@pytest.mark.parametrize(
    "media_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-16",
        "text/plain",
        "multipart/form-data",
        None,
    ],
)
@pytest.mark.parametrize("path", ["/invocations", "/v1/responses", "/v1/chat/completions", "/tokenize", "/nowhere"])
@pytest.mark.parametrize("method", ["POST", "PUT", "GET"])
def test_a_deep_body_whatever_its_type(media_type, path, method):
    headers = {} if media_type is None else {"content-type": media_type}
    for body in (DEEP, DEEP.decode().encode("utf-16"), chunks_of(DEEP[:1000], DEEP[1000:])):
        response = ask(path, body, method=method, headers=headers)
        assert response.status_code == 400
        assert "too deeply" in response.json()["error"]["message"]


@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON", "text/plain"])
def test_a_field_elsewhere_whatever_its_type(media_type):
    response = ask("/tokenize", b'{"kv_keep_ratio": 0.5}', headers={"content-type": media_type})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "kv_keep_ratio"


def test_a_name_split_between_chunks():
    assert ask("/tokenize", chunks_of(b'{"input": "hi", "kv_ke', b'ep_ratio": 0.5}')).status_code == 400


def test_errors_of_the_anthropic_api():
    error = ask("/v1/messages", b'{"kv_keep": 1}').json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "BadRequestError"
    assert "type" not in ask("/v1/responses", b'{"kv_keep": 1}').json()


@pytest.mark.parametrize(
    ("path", "root_path"), [("/v1/completions/", ""), ("/below/v1/completions", "/below"), ("/v1/completions", "")]
)
def test_paths_of_an_endpoint(path, root_path):
    content = b'{"kv_keep_ratio": 0.5}'
    response = ask(path, content, root_path=root_path)
    assert response.status_code == 200
    assert response.content == b"%d:%b;0:;" % (len(content), content)  # httpx ends a body with an empty chunk


def test_chunks_pass_as_they_came():
    response = ask("/v1/responses", chunks_of(b"ab", b"", b"cde"))
    assert response.content.startswith(b"2:ab;")
    assert b"3:cde;" in response.content


def test_a_body_is_parsed_once():
    async def tell(scope, receive, send):
        seen.append(scope.get(PARSED))
        await echo(scope, receive, send)

    seen: list = []
    for body in (b'{"kv_keep_ratio": 0.5}', b'{"prompt": "a"}'):
        assert ask("/v1/completions", body, tell).status_code == 200
    assert seen == [{"kv_keep_ratio": 0.5}, None]


class TestNumbers:
    def test_with_a_field(self):
        response = ask("/v1/responses", b'{"kv_keep_ratio": 0.5}', generate)
        assert response.json()["usage"] == {"input_tokens": 10, "kv_cache": NUMBERS}
        assert current.get() is None

    @pytest.mark.parametrize("by_default", [False, True])
    def test_without_a_field(self, by_default):
        settings = Settings(defaults=CompressionParams(keep_ratio=0.5 if by_default else 1))
        response = ask("/v1/responses", b"{}", generate, kv_settings=settings)
        assert ("kv_cache" in response.json()["usage"]) == by_default

    def test_of_a_stored_response(self):
        stored: dict[str, UsageBox] = {}
        ask("/v1/responses", b'{"kv_keep_ratio": 0.5}', generate, kv_stored_numbers=stored)
        ask("/v1/responses", b"{}", generate, kv_stored_numbers=stored)
        for path, has_numbers in (("/v1/responses/resp_1", True), ("/v1/responses/resp_2", False)):
            response = ask(path, None, generate, method="GET", kv_stored_numbers=stored)
            assert ("kv_cache" in response.json()["usage"]) == has_numbers
