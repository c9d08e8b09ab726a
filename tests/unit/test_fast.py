"""`make test-fast` is what it says: no engine, and the folders that CONTRIBUTING names."""

import re
import subprocess
from pathlib import Path

import pytest
from no_engines import SENTENCE, refuse_engines

ROOT = Path(__file__).parents[2]


def test_an_engine_that_starts_all_the_same_fails_its_test(monkeypatch, tmp_path):
    refuse_engines(monkeypatch)
    from http_server import Server
    from vllm.v1.engine.core import EngineCore

    for start in (EngineCore, lambda: Server(tmp_path / "log")):
        with pytest.raises(AssertionError, match=re.escape(SENTENCE)):
            start()
    assert not (tmp_path / "log").exists()


def test_the_folders_are_those_of_the_guide():
    command = subprocess.run(["make", "-n", "test-fast"], cwd=ROOT, capture_output=True, text=True, check=True)
    line = next(line for line in command.stdout.splitlines() if "--no-engines" in line)
    folders = set(re.findall(r"tests/\w+", line))
    rows = re.findall(r"^\| `(tests/\w+)` \|.*\| (yes|) ?\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert folders == {folder for folder, fast in rows if fast}
    assert {folder for folder, _ in rows} == {f"tests/{path.parent.name}" for path in ROOT.glob("tests/*/test_*.py")}


def test_the_two_halves_of_make_test_leave_nothing_out():
    command = subprocess.run(["make", "-n", "test-engines"], cwd=ROOT, capture_output=True, text=True, check=True)
    line = next(line for line in command.stdout.splitlines() if "pytest" in line)
    named = re.findall(r"tests/[\w/.:]+", line)
    folders, marked = (sorted(word for word in named if ("::" in word) == is_test) for is_test in (False, True))
    rows = re.findall(r"^\| `(tests/\w+)` \|.*\| (yes|) ?\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert folders == sorted(folder for folder, is_fast in rows if not is_fast)
    texts = [path.read_text() for folder, is_fast in rows if is_fast for path in (ROOT / folder).glob("test_*.py")]
    names = [name for text in texts for name in re.findall(r"@pytest\.mark\.engine\n(?: *@.*\n)* *def (\w+)", text)]
    assert sorted(word.rpartition("::")[2] for word in marked) == sorted(names)
    assert names
