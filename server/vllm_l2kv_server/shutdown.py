"""How the server ends: soon, whoever is still connected, and with an exit status that tells why."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

GRACE_SECONDS = 5
"""For what has been answered already to reach slow clients, once the engine is gone; uvicorn's default is for ever."""


@asynccontextmanager
async def bounded_end(app: FastAPI) -> AsyncIterator[None]:
    """The lifespan of our router: sets the bound at the start, notes at the end why it came.

    In-flight requests have their time before, from `--shutdown-timeout`: then vLLM stops the engine, then uvicorn.
    """
    state = app.state
    state.server.config.timeout_graceful_shutdown = GRACE_SECONDS
    yield
    state.args.engine_lost = state.engine_client.errored and not state.engine_client.told_to_stop
