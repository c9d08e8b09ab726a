"""Bounded shutdown: the server exits within seconds even with open connections, and reports an engine that failed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

GRACE_SECONDS = 5
"""Time for answers to reach slow clients after the engine has ended; uvicorn's default is unbounded."""


@asynccontextmanager
async def bounded_shutdown(app: FastAPI) -> AsyncIterator[None]:
    """Lifespan of the router: sets the bound at the start, and records at the end whether the engine ended by itself.

    Requests in flight get their time earlier, by `--shutdown-timeout`: vLLM stops the engine first, then uvicorn.
    """
    state = app.state
    state.server.config.timeout_graceful_shutdown = GRACE_SECONDS
    yield
    state.kv_outcome.engine_lost = state.engine_client.errored and not state.kv_engine_calls.was_shut_down
