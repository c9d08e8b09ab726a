"""A server that gets a signal, or loses its engine, while it answers: no client hangs, and no process is left."""

import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from http_server import Server
from load import ABORTED, ERRORS, IN_STREAM, NUM_STREAMS, check_end, outcomes_of, process_named, under_load


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


def check_errors(outcomes: list[str]) -> None:
    """Checks that each client has an error, or an answer that was cut short: no connection was just closed."""
    assert set(outcomes[:NUM_STREAMS]) <= {IN_STREAM, ABORTED}
    assert set(outcomes[NUM_STREAMS:]) <= {"500", ABORTED}


def test_sigterm(server, measured):
    """Together with a client that uploads slowly, for which uvicorn would wait for ever."""
    with under_load(server) as answers, stalled_upload(server):
        server.process.send_signal(signal.SIGTERM)
        seconds, outcomes = check_end(server), outcomes_of(answers)
        check_errors(outcomes)
    assert server.process.returncode == 0
    measured(fault="SIGTERM", seconds=seconds, status=0, outcomes=Counter(outcomes))


@pytest.mark.slow  # one more start of a server, and it ends as by SIGTERM
def test_interrupt(server, measured):
    """Sent to the whole process group, as by a terminal."""
    with under_load(server) as answers:
        for process in server.family():
            process.send_signal(signal.SIGINT)
        seconds, outcomes = check_end(server), outcomes_of(answers)
        assert set(outcomes) <= {*ERRORS, ABORTED}
    assert server.process.returncode == 0
    measured(fault="SIGINT to all processes", seconds=seconds, status=0, outcomes=Counter(outcomes))


def test_engine_killed(server, measured):
    with under_load(server) as answers:
        process_named(server, "EngineCore").kill()
        seconds, outcomes = check_end(server), outcomes_of(answers)
        check_errors(outcomes)
    assert server.process.returncode == 1
    assert "the engine ended by itself" in server.log.read_text()
    measured(fault="SIGKILL of the engine", seconds=seconds, status=1, outcomes=Counter(outcomes))
