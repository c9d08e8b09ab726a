"""The output of `vllm-l2kv serve` on a terminal, in place of vLLM's log."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import vllm
from vllm_l2kv_server.screen import QuietScreen, Screen, open_screen
from vllm_l2kv_server.start_phases import KV_CACHE, PHASES
from vllm_l2kv_server.welcome import LAST_LINE, READY

LOG = """\
Triton is installed, but doesn't include CPU backend. Disabling Triton.
(APIServer pid=7) INFO 11-26 13:48:21 [api_utils.py:286] non-default args: {'port': 8000}
(Worker pid=9) INFO 11-26 13:48:40 [cpu_model_runner.py:68] Starting to load model /models/tiny...
\rLoading safetensors checkpoint shards:   0% Completed | 0/2 [00:00<?, ?it/s]
\rLoading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00,  1.79it/s]
(Worker pid=9) WARNING 11-26 13:48:41 [worker.py:281] vllm-l2kv: Full heads waste 9 % of the cache.
(Worker pid=9) INFO 11-26 13:48:41 [gpu.py:63] vllm-l2kv: Of 2 layers, 2 decode in one call.
(Worker pid=9) INFO 11-26 13:48:41 [default_loader.py:501] Loading weights took 0.57 seconds
(Worker pid=10) INFO 11-26 13:48:41 [default_loader.py:501] Loading weights took 0.61 seconds
(EngineCore pid=8) INFO 11-26 13:48:42 [kv_cache_utils.py:2327] CPU KV cache size: 46,470 tokens, \
Maximum concurrency for 8,192 tokens per request: 5.67x
(EngineCore pid=8) INFO 11-26 13:48:43 [core.py:402] init engine (profile, create kv cache, warmup model) took 0.92 s
INFO:     Application startup complete.
"""
REQUESTS = """\
INFO:     127.0.0.1:1 - "GET /health HTTP/1.1" 200 OK
INFO:     127.0.0.1:1 - "GET /metrics HTTP/1.1" 200 OK
INFO:     127.0.0.1:1 - "POST /v1/chat/completions HTTP/1.1" 200 OK
INFO:     127.0.0.1:1 - "GET /v1/models HTTP/1.1" 401 Unauthorized
(APIServer pid=7) INFO 11-26 13:49:21 [loggers.py:286] Engine 000: Avg prompt throughput: 0.0 tokens/s
"""
FAILURE = """\
(VllmWorker-0 pid=5) ERROR 11-26 13:56:41 [multiproc_executor.py:953] WorkerProc failed to start.
(VllmWorker-0 pid=5) ERROR 11-26 13:56:41 [multiproc_executor.py:953] Traceback (most recent call last):
(VllmWorker-0 pid=5) ERROR 11-26 13:56:41 [multiproc_executor.py:953]     raise ValueError(
(VllmWorker-0 pid=5) ERROR 11-26 13:56:41 [multiproc_executor.py:953] ValueError: there are no weights
(EngineCore pid=4) ERROR 11-26 13:56:46 [core.py:1510] Exception: WorkerProc initialization failed.
RuntimeError: Engine core initialization failed. See root cause above.
"""


def shown(tmp_path: Path, log: str, failed: bool = False) -> list[str]:
    """Returns the lines that a log causes on a terminal (here a file), without those of progress."""
    path = tmp_path / "server.log"
    path.write_text(log)
    with (tmp_path / "terminal").open("w") as terminal:
        QuietScreen(path, terminal).close("vllm-l2kv: the end.\n", failed)
    lines = (tmp_path / "terminal").read_text().splitlines()
    assert lines[0] == f"Log: {path} (--verbose prints it here instead)"
    assert lines[-1] == "vllm-l2kv: the end."
    progress = tuple(phase.doing for phase in PHASES)
    return [re.sub(r"^ +\d+ s  ", "<s> ", line) for line in lines[1:-1] if not line.startswith(progress)]


def test_phases_of_a_start_and_warnings_of_vllm_l2kv(tmp_path):
    welcome = f"\n{READY} at http://localhost:8000.\n\ncurl it\n\n{LAST_LINE}\n"
    assert shown(tmp_path, LOG + welcome) == [
        "<s> vLLM imported, options checked",
        "<s> engine's processes started",
        "vllm-l2kv: Full heads waste 9 % of the cache.",
        "<s> weights loaded",
        "<s> KV cache of 46,470 tokens, 5.67 times the longest request (8,192)",
        "<s> warmed up",
        "<s> HTTP server started",
        "<s> in all",
        *welcome.splitlines(),
    ]


def test_bars_are_part_of_the_progress(tmp_path):
    path = tmp_path / "server.log"
    path.write_text(LOG[: LOG.index("(Worker pid=9) WARNING")])
    with (tmp_path / "terminal").open("w") as terminal:
        screen = QuietScreen(path, terminal)
        screen.close("")
    assert screen._progress.line().startswith("loading the weights (Loading safetensors checkpoint shards: 50 %), 0 s")


def test_a_log_without_the_lines_of_the_phases(tmp_path):
    """A log of level WARNING."""
    lines = shown(tmp_path, f"{READY} on a.sock.\n{LAST_LINE}\n")
    assert lines == ["<s> vLLM imported, options checked", "<s> in all", "", f"{READY} on a.sock.", LAST_LINE]


def test_requests_that_work_or_fail(tmp_path):
    lines = shown(tmp_path, f"{READY}\n{LAST_LINE}\n{REQUESTS}")
    assert [line[9:] for line in lines[lines.index(LAST_LINE) + 1 :]] == [
        "POST /v1/chat/completions 200",
        "GET /v1/models 401",
    ]
    assert not any("/v1" in line for line in shown(tmp_path, REQUESTS)), "there are no requests before it is ready"


def test_a_failure_shows_the_first_error(tmp_path):
    heading = f"The first error in {tmp_path / 'server.log'}:"
    error = [heading, "  WorkerProc failed to start.", "  ValueError: there are no weights"]
    assert shown(tmp_path, LOG + FAILURE, failed=True)[-3:] == error
    assert heading not in shown(tmp_path, LOG + FAILURE)
    # Without a logged error, the end of the log is shown.
    assert shown(tmp_path, "Traceback:\nMemoryError\n", failed=True)[-3:] == [
        f"The last lines of {tmp_path / 'server.log'}:",
        "  Traceback:",
        "  MemoryError",
    ]


def test_vllm_logs_the_lines_that_begin_the_phases():
    """vLLM's source contains each of the texts."""
    patterns = [phase.begins.pattern for phase in PHASES[1:] if phase.begins is not KV_CACHE]
    texts = {text.replace("\\", "") for pattern in patterns for text in pattern.split("|")}
    texts |= {"KV cache size: %s tokens, ", "Maximum concurrency for %s tokens per request: %.2fx"}
    folder = Path(vllm.__file__).parent
    for part in ("v1", "model_executor/model_loader", "entrypoints"):
        for path in (folder / part).rglob("*.py"):
            source = path.read_text()
            texts = {text for text in texts if text not in source}
    assert not texts


def on_a_terminal(code: str, home: Path, stdout_too: bool = True) -> tuple[str, str]:
    """Returns a script's output on its terminal, and on standard output if that is redirected."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=terminal if stdout_too else subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "XDG_CACHE_HOME": str(home)},
        text=True,
    )
    os.close(terminal)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    read = b""
    try:
        while part := os.read(controller, 4096):
            read += part
    except OSError:  # raised once the other side of the terminal is closed
        pass
    os.close(controller)
    return read.decode(), output or ""


PRINTS = """
import os
from vllm_l2kv_server.last_line import LastLine
from vllm_l2kv_server.screen import open_screen
last_line = LastLine(open_screen({verbose}, 8123))
print("by Python", flush=True)
os.system("echo by a child")
last_line.end(0, "stopped.")
"""


@pytest.mark.parametrize(("verbose", "is_quiet"), [(None, True), (False, True), (True, False)])
def test_a_terminal_is_quiet_unless_verbose(tmp_path, verbose, is_quiet):
    printed, _ = on_a_terminal(PRINTS.format(verbose=verbose), tmp_path)
    assert ("by a child" in printed) is ("by Python" in printed) is not is_quiet
    assert printed.endswith("vllm-l2kv: stopped.\r\n")
    log = tmp_path / "vllm-l2kv" / "serve-8123.log"
    assert log.exists() is is_quiet
    if is_quiet:
        assert log.read_text() == "by Python\nby a child\n"


def test_a_redirected_standard_output_gets_the_log(tmp_path):
    """`vllm-l2kv serve > FILE` on a terminal."""
    _, output = on_a_terminal(PRINTS.format(verbose=None), tmp_path, stdout_too=False)
    assert output == "by Python\nby a child\n"


def test_without_a_terminal_it_is_the_log(capfd, tmp_path, monkeypatch):
    """For example in a container."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert type(open_screen(None, 8123)) is Screen
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_is_printed(capfd, tmp_path, monkeypatch):
    (tmp_path / "vllm-l2kv").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert type(open_screen(False, 8123)) is Screen
    assert "so the log is printed here" in capfd.readouterr().err
