"""The bound on the length of request bodies."""

import asyncio

import httpx
import pytest
from vllm_l2kv_server.body_bound import BodyBoundMiddleware

MIB = 2**20


class App:
    """Counts the bytes that it receives."""

    def __init__(self):
        self.num_bytes = None

    async def __call__(self, scope, receive, send):
        self.num_bytes = 0
        more = True
        while more:
            message = await receive()
            self.num_bytes += len(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})


async def chunks(num_bytes: int):
    for _ in range(0, num_bytes, 1000):
        yield b"x" * 1000


def post(content, headers=None) -> tuple[httpx.Response, int | None]:
    app = App()

    async def run():
        transport = httpx.ASGITransport(BodyBoundMiddleware(app, max_mib=1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/anything", content=content, headers=headers)

    return asyncio.run(run()), app.num_bytes


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"x" * (MIB + 1), {}),
        (b"", {"content-length": str(MIB + 1)}),
        (b"x" * (MIB + 1), {"content-length": "7"}),
        (b"x" * (MIB + 1), {"content-length": "many"}),
        (chunks(2 * MIB), {}),
    ],
    ids=["long", "announced", "less announced", "nonsense announced", "chunked"],
)
def test_refused_before_the_app_is_called(content, headers):
    response, num_bytes = post(content, headers)
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["code"], error["type"]) == (413, "Request Entity Too Large")
    assert "1 MiB" in error["message"]
    assert "--max-body-mib" in error["message"]
    assert num_bytes is None


@pytest.mark.parametrize(("num_bytes", "is_chunked"), [(MIB, False), (1_000_000, True), (0, False)])
def test_passed_on(num_bytes, is_chunked):
    response, passed = post(chunks(num_bytes) if is_chunked else b"x" * num_bytes)
    assert response.status_code == 200
    assert passed == num_bytes


def test_reading_stops_at_the_bound():
    taken = 0

    async def receive():
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"transfer-encoding", b"chunked")]}
    asyncio.run(BodyBoundMiddleware(App(), max_mib=1)(scope, receive, send))
    assert taken == MIB // 1000 + 1


def test_other_scopes_and_requests_without_a_body_pass_as_they_are():
    seen = []

    async def app(scope, receive, send):
        seen.append((scope["type"], receive))

    async def run():
        for scope in ({"type": "lifespan"}, {"type": "websocket"}, {"type": "http", "method": "GET", "headers": []}):
            await BodyBoundMiddleware(app, max_mib=1)(scope, "receive", None)

    asyncio.run(run())
    assert seen == [("lifespan", "receive"), ("websocket", "receive"), ("http", "receive")]
