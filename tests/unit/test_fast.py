"""`make test-fast` starts no engine and runs the folders that CONTRIBUTING names."""

import re
import subprocess
from itertools import chain
from pathlib import Path

import pytest
from no_engines import ENGINE_FOLDERS, SENTENCE, refuse_engines

ROOT = Path(__file__).parents[2]


def test_a_test_that_starts_an_engine_fails(monkeypatch, tmp_path):
    refuse_engines(monkeypatch)
    from http_server import Server
    from vllm.v1.engine.core import EngineCore

    for start in (EngineCore, lambda: Server(tmp_path / "log")):
        with pytest.raises(AssertionError, match=re.escape(SENTENCE)):
            start()
    assert not (tmp_path / "log").exists()


def command_of(target: str) -> str:
    """Returns the pytest command of a make target."""
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if "pytest" in line)


def folders_in(text: str) -> set[str]:
    return set(re.findall(r"tests/\w+", text))


@pytest.fixture
def is_fast() -> dict[str, bool]:
    """Returns the folders that CONTRIBUTING marks as fast."""
    rows = re.findall(r"^\| `(tests/\w+)` \|.*\| (yes|) ?\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {folder: bool(fast) for folder, fast in rows}


def test_the_folders_are_those_of_the_guide(is_fast):
    assert folders_in(command_of("test-fast")) == {folder for folder, fast in is_fast.items() if fast}
    assert set(is_fast) == {f"tests/{path.parent.name}" for path in ROOT.glob("tests/*/test_*.py")}


def test_the_parts_of_make_test_leave_nothing_out(is_fast):
    """All tests outside the fast folders count as marked; of the fast folders, those with marked tests run too."""
    slow = {folder for folder, fast in is_fast.items() if not fast}
    assert slow == {f"tests/{name}" for name in ENGINE_FOLDERS}
    paths = [path for folder in is_fast.keys() - slow for path in (ROOT / folder).glob("test_*.py")]
    mark = re.compile(r"^( *@|pytestmark = )pytest\.mark\.engine$", re.MULTILINE)
    marked = {f"tests/{path.parent.name}" for path in paths if mark.search(path.read_text())}
    assert marked
    commands = [command_of(target) for target in ("test-engines", "test-e2e", "test-serving")]
    assert sorted(chain.from_iterable(map(folders_in, commands))) == sorted(slow | marked), "each once"
    for command in commands:
        assert '-m "engine and not slow"' in command
    assert '-m "not slow" --no-engines' in command_of("test-fast")
