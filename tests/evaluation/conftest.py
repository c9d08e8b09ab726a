"""What evaluations share."""

import sys
from pathlib import Path

import pytest

# The real server in a process of its own.
sys.path.append(str(Path(__file__).parent.parent / "e2e"))


@pytest.fixture(scope="session")
def server(demo_model, tmp_path_factory):
    from http_server import Server

    words = "--max-model-len 4096 --enforce-eager --dtype float32"
    with Server(tmp_path_factory.mktemp("server") / "server.log", *words.split()) as server:
        yield server
