"""Starts that fail after the engine's processes run: the last line is vllm-l2kv's, and no process is left."""

import signal
import time
from pathlib import Path

import psutil
import pytest
from http_server import START_SECONDS, Server

OPTIONS = ["--dtype", "float32", "--enforce-eager"]


def ended(server: Server) -> list[str]:
    """Returns the lines of a server that ends by itself, with all its processes."""
    try:
        server.process.wait(timeout=START_SECONDS)
        _, left = psutil.wait_procs(server.family(), timeout=10)
        assert not left
    finally:
        server.stop()
    return server.log.read_text().splitlines()


@pytest.fixture
def without_weights(tmp_path, llama) -> Path:
    """A folder that a front end accepts as a model, but an engine cannot load."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in llama.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).symlink_to(path)
    return folder


def test_an_engine_that_fails(without_weights, tmp_path, measured):
    begin = time.monotonic()
    server = Server(tmp_path / "server.log", str(without_weights), *OPTIONS)
    lines, seconds = ended(server), time.monotonic() - begin
    assert server.process.returncode == 1
    assert lines[-1] == "vllm-l2kv: the engine ended during its start; the first ERROR in the log above says why."
    first = next(line for line in lines if "ERROR" in line)
    assert "EngineCore" in first or "Worker" in first
    assert any("ERROR" in line and "weights" in line for line in lines)
    measured(start="a model without weights", seconds=seconds, status=1)


@pytest.mark.slow  # one more start; `tests/server/test_screen.py` has its parts
def test_an_engine_that_fails_on_a_terminal(without_weights, tmp_path, monkeypatch):
    """The reason is shown without the log."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server = Server(tmp_path / "terminal", str(without_weights), "--no-verbose", *OPTIONS)
    lines = ended(server)
    assert server.process.returncode == 1
    log = tmp_path / "vllm-l2kv" / f"serve-{server.port}.log"
    assert lines[-1] == f"vllm-l2kv: the engine ended during its start; the first ERROR in {log} says why."
    heading, _, error = lines[-4:-1]
    assert heading == f"The first error in {log}:"
    assert error.startswith("  RuntimeError: Cannot find any model weights")
    assert not any("Traceback" in line for line in lines)
    assert "Traceback" in log.read_text()


@pytest.mark.slow  # one more start, most of which the test before has
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_the_engine_starts(llama, tmp_path, number, status, measured):
    server = Server(tmp_path / "server.log", str(llama), *OPTIONS)
    deadline = time.monotonic() + START_SECONDS
    while not any("EngineCore" in process.name() for process in server.family()):
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.1)
    server.process.send_signal(number)
    begin = time.monotonic()
    lines, seconds = ended(server), time.monotonic() - begin
    assert server.process.returncode == status
    assert lines[-1] == f"vllm-l2kv: stopped by {number.name} before it was ready."
    measured(start=f"{number.name} while the engine starts", seconds=seconds, status=status)
