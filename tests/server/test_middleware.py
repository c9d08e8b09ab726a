"""Our fields, and unwieldy bodies, on endpoints that are not ours."""

import asyncio
import json

import httpx
import pytest
from vllm_l2kv_server.middleware import ForeignBodiesMiddleware

from vllm_l2kv.params import FIELD_NAMES

JSON = {"content-type": "application/json"}


async def echo(scope, receive, send):
    """Sends back the chunks that it received, each with its length."""
    assert scope["type"] == "http"
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


def post(path: str, content, headers=JSON, root_path: str = "") -> httpx.Response:
    async def run():
        transport = httpx.ASGITransport(ForeignBodiesMiddleware(echo), root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(run())


async def chunks_of(*parts: bytes):
    for part in parts:
        yield part


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_refused_elsewhere(name):
    response = post("/v1/responses", json.dumps({"input": "hi", name: 1}))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == name
    assert "/v1/chat/completions and /v1/completions only" in error["message"]


def test_refused_in_a_chunked_body():
    body = chunks_of(b'{"input": "hi", "kv_ke', b'ep_ratio": 0.5}')
    assert post("/v1/responses", body).status_code == 400


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/chat/completions", b'{"kv_keep_ratio": 0.5}'),
        ("/v1/completions", b'{"kv_keep_ratio": 0.5}'),
        ("/v1/responses", b'{"kv_keep_ratio": null}'),
        ("/v1/responses", b'{"kv_transfer_params": {}}'),
        ("/v1/responses", b'{"input": "say \\"kv_keep_ratio\\""}'),
        ("/v1/responses", b'{"vllm_xargs": {"kv_keep_ratio": 0.5}}'),
        ("/v1/responses", b'{"kv_keep_ratio"'),
        ("/v1/responses", b'["kv_keep_ratio"]'),
        ("/v1/responses", b'{"kv_keep_ratio":' + b"[" * 100_000),
    ],
)
def test_passed_on(path, content):
    response = post(path, content)
    assert response.status_code == 200
    assert response.content == b"%d:%b;0:;" % (len(content), content)  # httpx ends a body with an empty chunk


def test_chunks_pass_as_they_came():
    response = post("/v1/responses", chunks_of(b"ab", b"", b"cde"))
    assert response.content.startswith(b"2:ab;")
    assert b"3:cde;" in response.content


@pytest.mark.parametrize("path", ["/v1/responses", "/invocations"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a":' * 200 + b"1" + b"}" * 200, "too deeply"),
        (b'{"messages": [' + b"{}," * 40_000 + b"{}]}", "more than 30000 values"),
    ],
)
def test_unwieldy_bodies(path, content, words):
    response = post(path, content)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_token_ids_pass():
    assert post("/detokenize", json.dumps({"tokens": [5] * 100_000})).status_code == 200


def test_other_content_passes_unread():
    response = post("/v1/audio/transcriptions", b'{"kv_keep_ratio": 1}', {"content-type": "text/plain"})
    assert response.status_code == 200


def test_root_path():
    assert post("/llm/v1/completions", b'{"kv_keep_ratio": 0.5}', root_path="/llm").status_code == 200
    assert post("/llm/v1/responses", b'{"kv_keep_ratio": 0.5}', root_path="/llm").status_code == 400


def test_get_and_other_scopes_pass():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    async def run():
        for scope in ({"type": "lifespan"}, {"type": "websocket", "path": "/"}, {"type": "http", "method": "GET"}):
            await ForeignBodiesMiddleware(app)(scope, None, None)

    asyncio.run(run())
    assert seen == ["lifespan", "websocket", "http"]
