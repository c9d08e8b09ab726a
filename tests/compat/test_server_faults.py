"""A server of several processes that gets a signal, or loses a process, while it answers.

As in `tests/serving/test_faults.py`: all of it ends in time, no client hangs, and no process is left.
"""

import signal

import pytest
from http_server import Server
from load import check_end, process_named, texts_of, under_load

pytestmark = pytest.mark.slow

TWO_RANKS = "--tensor-parallel-size 2"
TWO_API_SERVERS = "--api-server-count 2"
TWO_ENGINES = "--data-parallel-size 2"  # vLLM also starts an API server for each
TWO_ENGINES_ONE_API_SERVER = "--data-parallel-size 2 --api-server-count 1"


@pytest.fixture
def server(request, tiny_model, tmp_path, monkeypatch):
    # vLLM needs a NUMA node for each rank and engine, unless threads stay unbound.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    words = "--dtype float32 --enforce-eager --max-model-len 4096 --kv-full-layers 0"
    with Server(tmp_path / "server.log", str(tiny_model("llama")), *words.split(), *request.param.split()) as server:
        yield server


def is_error(text: str) -> bool:
    """Whether it is an error in OpenAI's format, with a status or in a stream, or a closed connection."""
    return '"error":' in text or text.endswith("Error")


def is_aborted(text: str) -> bool:
    """Whether an answer was cut short as vLLM does when it stops an engine because another one ended."""
    return '"finish_reason":"abort"' in text


@pytest.mark.parametrize(
    ("server", "title"),
    [
        # This takes half of END_SECONDS: vLLM waits twice for the other rank, which waits for this one.
        pytest.param(TWO_RANKS, "Worker_TP1", id="one of two ranks"),
        pytest.param(TWO_API_SERVERS, "APIServer_1", id="one of two API servers"),
        pytest.param(TWO_API_SERVERS, "EngineCore", id="the engine of two API servers"),
    ],
    indirect=["server"],
)
def test_a_process_is_killed(server, title):
    with under_load(server) as answers:
        process_named(server, title).kill()
        check_end(server)
        texts = texts_of(answers)
        assert all(map(is_error, texts)), texts
    assert server.process.returncode == 1


@pytest.mark.parametrize("server", [TWO_ENGINES, TWO_ENGINES_ONE_API_SERVER], indirect=True)
def test_one_of_two_engines_is_killed(server):
    with under_load(server) as answers:
        process_named(server, "EngineCore_DP1").kill()
        check_end(server)
        texts = texts_of(answers)
        assert all(is_error(text) or is_aborted(text) for text in texts), texts
        assert any(map(is_error, texts)), texts
    assert server.process.returncode == 1


@pytest.mark.parametrize("server", [TWO_API_SERVERS], indirect=True)
def test_sigterm(server):
    with under_load(server) as answers:
        server.process.send_signal(signal.SIGTERM)
        check_end(server)
        texts = texts_of(answers)
        assert all(map(is_error, texts)), texts
    assert server.process.returncode == 0
