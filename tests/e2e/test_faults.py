"""A server that is told to stop, or loses its engine, while it answers: nobody hangs and nothing is left behind."""

import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import httpx
import psutil
import pytest
from http_server import Server

NUM_STREAMS = 4
NUM_PLAIN = 2
END_SECONDS = 20
"""Until the process is gone and every client has an answer; Kubernetes, for one, kills after 30."""


@pytest.fixture
def server(demo_model, tmp_path) -> Iterator[Server]:
    server = Server(tmp_path / "server.log", *["--max-model-len", "4096", "--enforce-eager", "--dtype", "float32"])
    try:
        server.wait_until_ready()
        yield server
    finally:
        kill(server)


def kill(server: Server) -> None:
    for process in server.family():
        process.kill()
    server.process.wait()


def ask(url: str, stream: bool) -> str:
    """What a client meets whose answer would take minutes: a status and the end of a text, or an error of httpx."""
    body = {"prompt": "The sea was", "max_tokens": 4000, "ignore_eos": True, "stream": stream, "kv_keep_ratio": 0.5}
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
            return f"{response.status_code} {response.read().decode()[-400:]}"
    except httpx.TransportError as error:
        return type(error).__name__


def num_running(url: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


@contextmanager
def load(server: Server) -> Iterator[list]:
    """Requests in flight: streams first, then others."""
    with ThreadPoolExecutor(NUM_STREAMS + NUM_PLAIN) as pool:
        answers = [pool.submit(ask, server.url, number < NUM_STREAMS) for number in range(NUM_STREAMS + NUM_PLAIN)]
        try:
            deadline = time.monotonic() + 60
            while num_running(server.url) < len(answers):
                assert time.monotonic() < deadline, [answer.result() for answer in answers if answer.done()]
                time.sleep(0.2)
            yield answers
        finally:
            kill(server)  # or the pool would wait for clients that hang


@contextmanager
def stalled_upload(server: Server) -> Iterator[None]:
    """A client that never sends the rest of its body."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
        client.sendall(b'Content-Length: 1000\r\n\r\n{"prompt": ')
        time.sleep(1)
        yield


def check_end(server: Server) -> None:
    """The server ends in time, with all its processes, and its port is free."""
    server.process.wait(END_SECONDS)
    _, left = psutil.wait_procs(server.family(), timeout=5)
    assert left == []
    with socket.socket() as listener:
        # As servers do: closed connections to the port may linger.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", server.port))


def check_answers(answers: list) -> None:
    """Everybody has an error in OpenAI's format: with a status, or in the stream that had begun with 200."""
    _, hanging = wait(answers, timeout=5)
    assert not hanging
    texts = [answer.result() for answer in answers]
    assert all('"error":' in text for text in texts), texts
    assert [text[:3] for text in texts] == ["200"] * NUM_STREAMS + ["500"] * NUM_PLAIN, texts


def engine(server: Server) -> psutil.Process:
    (engine,) = [process for process in server.family() if "EngineCore" in process.name()]
    return engine


def test_sigterm(server):
    """Together with a client that uploads slowly, for whom uvicorn would wait for ever."""
    with load(server) as answers, stalled_upload(server):
        server.process.send_signal(signal.SIGTERM)
        check_end(server)
        check_answers(answers)
    assert server.process.returncode == 0


def test_interrupt(server):
    """As a terminal sends it, to the whole process group."""
    with load(server) as answers:
        for process in server.family():
            process.send_signal(signal.SIGINT)
        check_end(server)
        _, hanging = wait(answers, timeout=5)
        assert not hanging
    assert server.process.returncode == 0


def test_engine_killed(server):
    with load(server) as answers:
        engine(server).kill()
        check_end(server)
        check_answers(answers)
    assert server.process.returncode == 1
    assert "the engine ended by itself" in server.log.read_text()
