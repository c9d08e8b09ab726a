"""A client that disconnects while it sends its body."""

import asyncio

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from vllm_l2kv_server.body import CheckedBodyRoute


@pytest.mark.parametrize("route_class", [APIRoute, CheckedBodyRoute])
def test_it_is_not_a_server_error(route_class):
    """As in FastAPI's own routes. An exception would cause a traceback in the log and a 500 in the metrics."""
    router = APIRouter(route_class=route_class)

    @router.post("/")
    async def answer(body: dict) -> dict:
        return body

    app = FastAPI()
    app.include_router(router)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"9")]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    statuses = []

    async def receive():
        return next(messages)

    async def send(message):
        statuses.append(message.get("status"))

    asyncio.run(app(scope, receive, send))
    assert statuses[:1] in ([], [400])
