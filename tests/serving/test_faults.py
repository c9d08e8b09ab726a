"""A server that gets a signal, or loses its engine, while it answers: no client hangs, and no process is left."""

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from http_server import Server
from load import NUM_PLAIN, NUM_STREAMS, Answers, check_end, process_named, texts_of, under_load


@pytest.fixture
def server(demo_model, tmp_path) -> Iterator[Server]:
    words = "--max-model-len 4096 --enforce-eager --dtype float32"
    with Server(tmp_path / "server.log", *words.split()) as server:
        yield server


@contextmanager
def stalled_upload(server: Server) -> Iterator[None]:
    """A client that never sends the rest of its body."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
        client.sendall(b'Content-Length: 1000\r\n\r\n{"prompt": ')
        time.sleep(1)
        yield


def check_errors(answers: Answers) -> None:
    """Checks that each client has an error in OpenAI's format: with a status, or in a stream that began with 200.

    Or an answer with `abort` as its reason: an engine that is stopped may abort a request before it ends.
    """
    texts = texts_of(answers)
    for text, status in zip(texts, ["200"] * NUM_STREAMS + ["500"] * NUM_PLAIN, strict=True):
        assert ('"error":' in text and text[:3] == status) or '"finish_reason":"abort"' in text, texts


def test_sigterm(server):
    """Together with a client that uploads slowly, for which uvicorn would wait for ever."""
    with under_load(server) as answers, stalled_upload(server):
        server.process.send_signal(signal.SIGTERM)
        check_end(server)
        check_errors(answers)
    assert server.process.returncode == 0


@pytest.mark.slow  # one more start of a server, and it ends as by SIGTERM
def test_interrupt(server):
    """Sent to the whole process group, as by a terminal."""
    with under_load(server) as answers:
        for process in server.family():
            process.send_signal(signal.SIGINT)
        check_end(server)
        texts_of(answers)
    assert server.process.returncode == 0


def test_engine_killed(server):
    with under_load(server) as answers:
        process_named(server, "EngineCore").kill()
        check_end(server)
        check_errors(answers)
    assert server.process.returncode == 1
    assert "the engine ended by itself" in server.log.read_text()
