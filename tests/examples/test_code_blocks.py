"""Code blocks in README.md and docs/ run against the real server; a block that cannot run states its reason."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>\S.*?) -->\n)?```(?P<language>.*)\n(?P<code>(?:.*\n)*?)```$", re.MULTILINE
)
SERVED = re.compile(r"http://(?:localhost|127\.0\.0\.1):8000")
USAGE = re.compile(r"\{[^{}]*evicted_tokens[^{}]*\}")
PARSED = {"json": json.loads, "yaml": yaml.safe_load}
SHOWN = {"promql", "text"}
RUN = {"python", "bash", "console"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start("language")) + 1, found["language"], found["code"], found["reason"])
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_of(session: str) -> str:
    """Returns the commands of a console session, without the start of the server, which is the fixture's."""
    typed = re.findall(r"^\$ ((?:.*\\\n)*.*)$", session, re.MULTILINE)
    return "\n".join(line for line in typed if not line.startswith("make serve"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of what a reader's clone has after `make setup`, so that commands cannot damage this one."""
    for name in ("benchmarks", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


@pytest.mark.engine
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in RUN and not block.reason], ids=str)
def test_it_runs(server, folder, block):
    code = SERVED.sub(server.url, commands_of(block.code) if block.language == "console" else block.code)
    assert code.strip(), "nothing of it is run, so it needs a reason"
    command = [sys.executable, "-c", code] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    # Examples take the server's address from the environment; blocks contain it.
    environment = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [ast.literal_eval(found) for found in USAGE.findall(done.stdout)]
    # A model's texts may differ between machines, counts of tokens may not.
    assert [ast.literal_eval(found) for found in USAGE.findall(block.code)] in ([], printed)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in PARSED], ids=str)
def test_data_can_be_read(block):
    assert PARSED[block.language](block.code)


def test_every_block_is_of_a_tested_kind():
    unknown = {str(block): block.language for block in BLOCKS if block.language not in {*RUN, *PARSED, *SHOWN}}
    assert not unknown, "name the language: it runs, it is data, or it is only shown (text)"


def test_no_fence_is_missed():
    for page in PAGES:
        assert len(re.findall(r"^\s*(?:```|~~~)", page.read_text(), re.MULTILINE)) == 2 * len(blocks_of(page)), page


def test_a_console_session_is_what_was_typed():
    assert commands_of("$ make serve &\n$ echo a \\\n    b\na b\n$ true\n") == "echo a \\\n    b\ntrue"
