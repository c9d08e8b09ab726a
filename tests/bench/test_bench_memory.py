"""Finding the process of a URL, and its memory."""

import os
import subprocess
import sys

import pytest

from vllm_l2kv.tools.bench.memory import counter, is_local, process_of

MIB = 2**20
CHILD = "import sys; held = bytearray(80 * 2**20); print('ready', flush=True); sys.stdin.read()"


def test_the_process_that_listens(ours):
    assert process_of(ours.url) == os.getpid()
    assert process_of(ours.url.replace("127.0.0.1", "localhost")) == os.getpid()


@pytest.mark.parametrize("url", ["http://192.0.2.1:80", "http://127.0.0.1:1", "http://nowhere.invalid:80", "http://"])
def test_no_process(url):
    assert process_of(url) is None


def test_addresses_of_this_machine():
    assert is_local("127.0.0.1")
    assert is_local("::1")
    assert not is_local("192.0.2.1")


def test_child_processes_count():
    before = counter(os.getpid())()["tree"]
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout.readline() == "ready\n"
        assert counter(os.getpid())()["tree"] - before > 75 * MIB
        child.communicate("")


def test_memory_of_no_process():
    assert counter(None)() == {}
    assert "tree" not in counter(2**22 + 1)()  # no such process


def test_memory_of_gpus_is_added_up(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 1000\necho 24\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert counter(os.getpid())()["gpus"] == 1024 * MIB
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert "gpus" not in counter(os.getpid())()
