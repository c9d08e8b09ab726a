"""A server that strangers can reach, for all tests here that only ask; others start their own."""

from collections.abc import Iterator

import pytest
from http_server import KEY, Server


@pytest.fixture(scope="session")
def server(demo_model, tmp_path_factory) -> Iterator[Server]:
    """Needs a key, bounds bodies, takes templates from requests and calls tools; ends without orphans."""
    # Without MODEL: that serves the demo model under its own name, and the fixture has fetched it.
    words = "--max-model-len 4096 --enforce-eager --dtype float32 --enable-auto-tool-choice --tool-call-parser hermes"
    words += f" --trust-request-chat-template --api-key {KEY} --max-body-mib 1"
    with Server(tmp_path_factory.mktemp("guarded") / "server.log", *words.split()) as server:
        yield server
        assert len(server.family()) > 1
        assert server.stop() == []
        assert server.process.returncode == 0
