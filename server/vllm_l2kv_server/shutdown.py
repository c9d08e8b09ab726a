"""Bounded shutdown: the server exits within seconds even with open connections, and reports an engine that was lost."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

GRACE_SECONDS = 5
"""For answers to reach slow clients once the engine is gone; uvicorn's default is no bound."""


@asynccontextmanager
async def bounded_shutdown(app: FastAPI) -> AsyncIterator[None]:
    """The lifespan of our router: sets the bound at the start, and notes at the end whether the engine was lost.

    Requests in flight get their time before, from `--shutdown-timeout`: vLLM stops the engine first, then uvicorn.
    """
    state = app.state
    state.server.config.timeout_graceful_shutdown = GRACE_SECONDS
    yield
    state.kv_outcome.engine_lost = state.engine_client.errored and not state.kv_engine_calls.was_shut_down
