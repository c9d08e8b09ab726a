"""Two servers behind vllm-router: the fields, the errors and the numbers pass through it."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from http_server import Server, expected_usage, free_port
from usages import TINY_SHARE

pytestmark = pytest.mark.slow

MODEL = "tiny"
NUM_TOKENS = 300
Router = Callable[[str], contextlib.AbstractContextManager[httpx.Client]]


@pytest.fixture(scope="module")
def replicas(tiny_model, tmp_path_factory) -> Iterator[list[Server]]:
    words = f"--served-model-name {MODEL} --dtype float32 --enforce-eager --max-model-len 2048 --kv-full-layers 0"
    folder = tmp_path_factory.mktemp("replicas")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        # Otherwise all servers bind their threads to the same cores.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        servers = [Server(folder / f"{name}.log", str(tiny_model("llama")), *words.split()) for name in "ab"]
        for server in servers:
            stack.enter_context(server)
        yield servers


@pytest.fixture(scope="module")
def router(replicas, tool, tmp_path_factory) -> Router:
    """Starts the router with a policy."""
    program = tool("vllm-router")

    @contextlib.contextmanager
    def running(policy: str) -> Iterator[httpx.Client]:
        port = free_port()
        command = [program, "--worker-urls", *(server.url for server in replicas), "--policy", policy]
        options = ["--port", str(port), "--prometheus-port", str(free_port()), "--worker-startup-check-interval", "1"]
        with (tmp_path_factory.mktemp("router") / "log").open("w") as log:
            process = subprocess.Popen(
                [*command, *options], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                wait_for(client)
                yield client
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)

    return running


@pytest.fixture(scope="module")
def client(router) -> Iterator[httpx.Client]:
    with router("round_robin") as client:
        yield client


def wait_for(client: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").is_success:
                return
        assert time.monotonic() < deadline, "the router did not start"
        time.sleep(0.2)


def ask(client: httpx.Client, prompt: list[int] | None = None, headers: dict[str, str] | None = None, **fields):
    body = {"model": MODEL, "prompt": prompt or list(range(100, 100 + NUM_TOKENS)), "max_tokens": 4, "ignore_eos": True}
    return client.post("/v1/completions", json={**body, **fields}, headers=headers)


def asked(replicas: list[Server]) -> list[float]:
    """Returns the prompt tokens that each replica looked up in its prefix cache."""
    return [server.metrics()["vllm:prefix_cache_queries_total"] for server in replicas]


def test_numbers_come_back_from_both(client, replicas):
    before = asked(replicas)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda ratio: (ratio, ask(client, kv_keep_ratio=ratio)), [0.5, 0.25, 1.0] * 4))
    for ratio, answer in answers:
        assert answer.json()["usage"]["kv_cache"] == expected_usage(
            NUM_TOKENS, 4, full_share=TINY_SHARE, keep_ratio=ratio
        )
    assert all(after > there for after, there in zip(asked(replicas), before, strict=True))


def test_chat(client):
    messages = [{"role": "user", "content": "The keeper of the lighthouse saw eleven ships. " * 8}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 4, "kv_keep_ratio": 0.5}
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    lengths = usage["prompt_tokens"], usage["completion_tokens"]
    assert usage["kv_cache"] == expected_usage(*lengths, full_share=TINY_SHARE, keep_ratio=0.5)


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("kv_keep_ratio", {"kv_keep_ratio": 7}),
        ("kv_kep_ratio", {"kv_kep_ratio": 0.5}),
        ("kv_protect_last", {"vllm_xargs": {"kv_protect_last": -1}}),
    ],
)
def test_errors(client, param, fields):
    answer = ask(client, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].split(".")[-1] == param


def test_stream(client):
    body = {"stream": True, "stream_options": {"include_usage": True}, "kv_keep_ratio": 0.5}
    events = [line.removeprefix("data: ") for line in ask(client, **body).text.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert len(events) == 4 + 2
    expected = expected_usage(NUM_TOKENS, 4, full_share=TINY_SHARE, keep_ratio=0.5)
    assert json.loads(events[-2])["usage"]["kv_cache"] == expected


def test_the_page_about_compression(client, replicas):
    page = client.get("/v1/kv_compression").json()
    assert page == httpx.get(f"{replicas[0].url}/v1/kv_compression", timeout=30).json()


def test_a_document_stays_on_one_replica(router, replicas):
    """The router goes by the header that names it, so it is compressed once; several documents spread over both."""
    documents = [list(range(start, start + 600)) for start in range(2000, 7000, 600)]
    with router("consistent_hash") as client:
        before = asked(replicas)
        for question in range(3):
            for number, document in enumerate(documents):
                fields = {"kv_keep_ratio": 0.5, "kv_prefix_tokens": len(document)}
                headers = {"X-Session-ID": f"document {number}"}
                answer = ask(client, [*document, 100 + question], headers, **fields).json()
                assert answer["usage"]["kv_cache"]["found_tokens"] == (len(document) if question else 0)
        assert all(after > there for after, there in zip(asked(replicas), before, strict=True))


def test_requests_go_around_a_replica_that_ended(router, replicas):
    with router("round_robin") as client:
        replicas[1].stop()
        assert [ask(client, kv_keep_ratio=0.5).status_code for _ in range(4)] == [200] * 4
