"""All output of an engine goes to a file, from anywhere in the process, and errors still reach the user."""

import os
import subprocess
import sys

import pytest

from vllm_l2kv.tools.engine_log import NUM_LAST_LINES, last_lines, output_to

SCRIPT = """
import os, subprocess, sys
from pathlib import Path
from vllm_l2kv.tools.engine_log import output_to

print("before")
with output_to(Path("engine.log")) as terminal:
    print("by Python")
    os.write(2, b"by C\\n")
    subprocess.run([sys.executable, "-c", "print('by a child')"], check=True)
    terminal.write("on the terminal\\n")
print("after")
"""


def test_everything_that_is_printed_goes_to_the_file(tmp_path):
    """Runs in a separate process, since pytest has replaced the streams of this one."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("before\nafter\n", "on the terminal\n")
    assert sorted((tmp_path / "engine.log").read_text().splitlines()) == ["by C", "by Python", "by a child"]


def test_an_error_comes_through_and_the_terminal_is_back(capfd, tmp_path):
    with pytest.raises(RuntimeError, match="no memory"), output_to(tmp_path / "engine.log"):
        raise RuntimeError("no memory")
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"


def test_descriptors_are_given_back(tmp_path):
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    for _ in range(3):
        with output_to(tmp_path / "engine.log"):
            pass
    assert opened() == before


def test_the_end_of_a_log(tmp_path):
    path = tmp_path / "engine.log"
    path.write_bytes(b"\xff\n" + b"".join(b"line %d\n" % number for number in range(100)))
    heading, *lines = last_lines(path).splitlines()
    assert heading == f"The last lines of {path}:"
    assert [line.strip() for line in lines] == [f"line {number}" for number in range(100 - NUM_LAST_LINES, 100)]
