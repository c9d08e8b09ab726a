"""For any body a client gets 4xx or an answer, the engine survives, and clients without a key learn nothing."""

import gzip
import json
import socket
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from http_bodies import HARMFUL, HARMFUL_TO_CHAT
from http_server import KEY
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans

HEADERS = {"authorization": f"Bearer {KEY}"}
JSON = {"content-type": "application/json"}
GOOD = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 2},
    "/v1/completions": {"prompt": "Hello, my name is", "max_tokens": 2},
}
PATHS = sorted(GOOD)
SHORT = {"max_tokens": 2, "max_completion_tokens": None, "min_tokens": 0, "n": 1}
"""Bounds of values, so that a CPU answers in time."""

SECRET = "the treasure lies below the third oak"
MIB = 2**20


@pytest.fixture(scope="module")
def http(server) -> Iterator[httpx.Client]:
    # uvicorn closes a connection after an error of the app; the next request must not take that for a dead server.
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60, limits=limits) as http:
        yield http


@pytest.fixture(autouse=True)
def lives_on(http) -> Iterator[None]:
    """Checks after each test that the server answers as before."""
    yield
    assert http.get("/health").status_code == 200
    for path in PATHS:
        answer = http.post(path, json={**GOOD[path], "kv_keep_ratio": 0.5})
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] > 0


@pytest.fixture(scope="module")
def api(http):
    return schemathesis.openapi.from_dict(http.get("/openapi.json").json())


@pytest.mark.parametrize("path", PATHS)
def test_openapi(api, server, path):
    """Bodies from the server's own OpenAPI: half of them plain, half merged into a valid body to get further."""

    # Not by schemathesis' own decorator, which does not support this pytest.
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=api[path]["POST"].as_strategy(), is_over_good=booleans())
    def check(case, is_over_good):
        if isinstance(case.body, dict):
            messages = GOOD["/v1/chat/completions"]["messages"]
            over_good = {**GOOD[path], **case.body, "model": None, "messages": messages}
            case.body = {**(over_good if is_over_good else case.body), **SHORT}
        response = case.call(base_url=server.url, headers=HEADERS, timeout=60)
        assert response.status_code < 500, response.text
        statuses.append(response.status_code)

    statuses: list[int] = []
    check()
    assert {200, 400} <= set(statuses)


@pytest.mark.parametrize("path", PATHS)
def test_harmful_values(http, path):
    for fields in HARMFUL + (HARMFUL_TO_CHAT if "chat" in path else []):
        response = http.post(path, json={**GOOD[path], **fields})
        assert 400 <= response.status_code < 500, (str(fields)[:200], response.text[:500])
        assert response.json()["error"]["message"], str(fields)[:200]


def test_harmful_values_in_a_stream(http):
    body = {**GOOD["/v1/completions"], "stream": True, "structured_outputs": {"grammar": "root ::= root"}}
    (event,) = [line for line in http.post("/v1/completions", json=body).text.splitlines() if "error" in line]
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == 400


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/chat/completions/batch", "/invocations"])
@pytest.mark.parametrize("fields", HARMFUL[:3])
def test_harmful_values_elsewhere(http, path, fields):
    body = {"model": "SmolLM2-135M-Instruct", "input": "hi", **GOOD["/v1/chat/completions"], **fields}
    assert 400 <= http.post(path, json=body).status_code < 500


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ('{"prompt": "\u00e9"}'.encode("latin-1"), {"content-type": "application/json; charset=latin-1"}),
        (gzip.compress(b'{"prompt": "a"}'), {"content-encoding": "gzip"}),
        (b'{"prompt": "\xff\xfe"}', {}),
        (b'{"prompt": "a", "prompt": [[]], "messages": 1}', {}),
        (b"\xef\xbb\xbf{}", {}),
        (b"prompt=a", {"content-type": "application/x-www-form-urlencoded"}),
        (b"{}", {"content-type": ""}),
        (b"", {}),
        (b"[" * MIB, {}),
        (b"[]," * 300_000, {}),
        (b"1" * MIB, {}),
        (b'{"a": "' + b"\\ud800" * 100_000 + b'"}', {}),
    ],
)
def test_odd_bodies(http, path, body, headers):
    assert 400 <= http.post(path, content=body, headers={**JSON, **headers}).status_code < 500


class TestBound:
    @pytest.mark.parametrize("path", [*PATHS, "/v1/responses", "/tokenize"])
    @pytest.mark.parametrize("chunked", [False, True])
    def test_413(self, http, path, chunked):
        body = b'{"prompt": "' + b"a" * MIB + b'"}'
        parts = (body[start : start + 10_000] for start in range(0, len(body), 10_000))
        response = http.post(path, content=parts if chunked else body, headers=JSON)
        assert response.status_code == 413
        error = response.json()["error"]
        assert error["code"] == 413
        assert "1 MiB" in error["message"]
        assert "--max-body-mib" in error["message"]

    def test_a_body_is_not_read_if_its_length_is_announced(self, server):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n".encode())
            client.sendall(b"Content-Length: 999999999999\r\n\r\n{")
            assert client.recv(1000).startswith(b"HTTP/1.1 413 ")

    @pytest.mark.parametrize("length", ["-1", "many", "5, 6", "9" * 40])
    def test_invalid_lengths(self, server, length):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n".encode())
            client.sendall(f"Content-Length: {length}\r\n\r\n{{}}".encode())
            assert client.recv(1000).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 "))

    def test_just_below(self, http):
        body = {**GOOD["/v1/completions"], "user": "a" * (MIB - 1000)}
        assert http.post("/v1/completions", json=body).status_code == 200


class TestKey:
    @pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": KEY}])
    def test_the_routes_of_vllm_l2kv_need_it(self, server, headers):
        for path in PATHS:
            assert httpx.post(f"{server.url}{path}", json=GOOD[path], headers=headers).status_code == 401
        assert httpx.get(f"{server.url}/v1/kv_compression", headers=headers).status_code == 401

    def test_bodies_without_a_key_are_not_checked(self, server):
        body = b"[" * 2 * MIB
        assert httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON).status_code == 401

    def test_no_client_reads_the_prompts_of_others(self, server, http):
        fields = {"user": SECRET, "request_id": "oak", "cache_salt": SECRET, "kv_keep_ratio": 0.5}
        answer = http.post("/v1/completions", json={**GOOD["/v1/completions"], "prompt": SECRET, **fields})
        assert answer.status_code == 200
        assert http.post("/v1/completions", json={"prompt": SECRET, "kv_keep_ratio": SECRET}).status_code == 400
        spec = http.get("/openapi.json").json()
        shown = [path for path, methods in spec["paths"].items() if "get" in methods and "{" not in path]
        for path in [*shown, "/docs", "/redoc", "/openapi.json"]:
            assert SECRET not in http.get(path).text, path
            assert KEY not in http.get(path).text, path
        assert SECRET not in server.log.read_text()
