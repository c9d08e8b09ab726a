"""A server of several processes that gets a signal, or loses a process, while it answers.

As in `tests/serving/test_faults.py`: all of it ends in time, no client hangs, and no process is left.
"""

import signal
from collections import Counter

import pytest
from http_server import Server
from load import ABORTED, ERRORS, check_end, outcomes_of, process_named, under_load

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
def test_a_process_is_killed(request, server, title, measured):
    with under_load(server) as answers:
        process_named(server, title).kill()
        seconds, outcomes = check_end(server), outcomes_of(answers)
        assert set(outcomes) <= ERRORS
    assert server.process.returncode == 1
    fault = f"SIGKILL of {request.node.callspec.id}"
    measured(fault=fault, seconds=seconds, status=1, outcomes=Counter(outcomes))


@pytest.mark.parametrize(
    "server",
    [
        pytest.param(TWO_ENGINES, id="one of two engines"),
        pytest.param(TWO_ENGINES_ONE_API_SERVER, id="one of two engines with one API server"),
    ],
    indirect=True,
)
def test_one_of_two_engines_is_killed(request, server, measured):
    """vLLM then stops the other one, which cuts its answers short."""
    with under_load(server) as answers:
        process_named(server, "EngineCore_DP1").kill()
        seconds, outcomes = check_end(server), outcomes_of(answers)
        assert set(outcomes) <= {*ERRORS, ABORTED}
        assert set(outcomes) & ERRORS
    assert server.process.returncode == 1
    fault = f"SIGKILL of {request.node.callspec.id}"
    measured(fault=fault, seconds=seconds, status=1, outcomes=Counter(outcomes))


@pytest.mark.parametrize("server", [TWO_API_SERVERS], indirect=True)
def test_sigterm(server, measured):
    with under_load(server) as answers:
        server.process.send_signal(signal.SIGTERM)
        seconds, outcomes = check_end(server), outcomes_of(answers)
        assert set(outcomes) <= ERRORS
    assert server.process.returncode == 0
    measured(fault="SIGTERM, two API servers", seconds=seconds, status=0, outcomes=Counter(outcomes))
