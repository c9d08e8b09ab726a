"""Clients that always wait for an answer, and checks of how a server ends under their load."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import httpx
import psutil
from http_server import START_SECONDS, Server

NUM_STREAMS = 4
NUM_PLAIN = 2
END_SECONDS = 20
"""Time until the process has ended and every client has an answer; Kubernetes kills after 30."""

CLOSED, IN_STREAM, ABORTED = "connection closed", "error in the stream", "`abort`"
ERRORS = {CLOSED, IN_STREAM, "500"}
"""What clients may get from a server that fails, beside `ABORTED`."""

Answers = list[Future[str]]


def ask(url: str, stream: bool) -> str:
    """Sends requests until one fails; returns a status and the end of its text, or an error of httpx."""
    body = {"prompt": "The sea was", "max_tokens": 4000, "ignore_eos": True, "stream": stream, "kv_keep_ratio": 0.5}
    try:
        while True:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as response:
                text = response.read().decode()
            if '"finish_reason":"length"' not in text:
                return f"{response.status_code} {text[-1500:]}"
    except httpx.TransportError as error:
        return type(error).__name__


@contextmanager
def under_load(server: Server) -> Iterator[Answers]:
    """Keeps requests in flight: streams first, then others."""
    with ThreadPoolExecutor(NUM_STREAMS + NUM_PLAIN) as pool:
        answers = [pool.submit(ask, server.url, number < NUM_STREAMS) for number in range(NUM_STREAMS + NUM_PLAIN)]
        try:
            deadline = time.monotonic() + START_SECONDS
            while server.metrics()["vllm:num_requests_running"] < len(answers):
                failed = [answer.result() for answer in answers if answer.done()]
                assert not failed, failed
                assert time.monotonic() < deadline, server.log.read_text()[-4000:]
                time.sleep(0.2)
            yield answers
        finally:
            kill(server)  # otherwise the pool would wait for clients that hang


def kill(server: Server) -> None:
    for process in server.family():
        process.kill()
    server.process.wait()


def process_named(server: Server, title: str) -> psutil.Process:
    """Returns the one process of the server whose title in `ps` ends so."""
    (process,) = [process for process in server.family() if process.name().endswith(title)]
    return process


def check_end(server: Server) -> float:
    """Checks that the server ends in time, with all its processes, and frees its port; returns the seconds it took."""
    begin = time.monotonic()
    server.process.wait(END_SECONDS)
    _, left = psutil.wait_procs(server.family(), timeout=5)
    assert left == []
    with socket.socket() as listener:
        # As servers do, since closed connections to the port may linger.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", server.port))
    return time.monotonic() - begin


def outcomes_of(answers: Answers) -> list[str]:
    """Returns what every client got; none may hang."""
    _, hanging = wait(answers, timeout=5)
    assert not hanging
    return [_outcome(answer.result()) for answer in answers]


def _outcome(text: str) -> str:
    """Names an end that tests expect, and returns any other text as it is."""
    if text.endswith("Error"):
        return CLOSED
    if '"error":' in text:  # in OpenAI's format, with a status or in a stream that began with 200
        return IN_STREAM if text.startswith("200") else text[:3]
    # vLLM cuts answers short when it stops an engine.
    return ABORTED if '"finish_reason":"abort"' in text else text
