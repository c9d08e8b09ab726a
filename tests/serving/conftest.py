"""A shared server, for tests that only send requests; other tests start their own."""

from collections.abc import Iterator

import pytest
from http_server import KEY, Server


@pytest.fixture(scope="session")
def server(demo_model, tmp_path_factory) -> Iterator[Server]:
    """A server with a key, a bound on bodies, templates from requests and tools; it must end without orphans."""
    # Without MODEL it serves the demo model under its own name; the fixture has downloaded the model.
    words = "--max-model-len 4096 --enforce-eager --dtype float32 --enable-auto-tool-choice --tool-call-parser hermes"
    words += f" --trust-request-chat-template --api-key {KEY} --max-body-mib 1"
    with Server(tmp_path_factory.mktemp("guarded") / "server.log", *words.split()) as server:
        yield server
        assert len(server.family()) > 1
        assert server.stop() == []
        assert server.process.returncode == 0
