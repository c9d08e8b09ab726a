"""A client who leaves while its body is still on its way."""

import asyncio

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from vllm_l2kv_server.body import CheckedBodyRoute


@pytest.mark.parametrize("route_class", [APIRoute, CheckedBodyRoute])
def test_is_no_error_of_the_server(route_class):
    """As with FastAPI's own routes. An exception would be a traceback in the log and a 500 in the metrics."""
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
