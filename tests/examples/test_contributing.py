"""CONTRIBUTING.md names existing files and commits of this repository's history."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = dict(re.findall(r"^### (A new .*)\n((?:(?!^##).*\n)*)", PAGE, re.MULTILINE))
FOLDERS = "vllm_l2kv|server|tests|docs|configs|docker|examples|benchmarks|requirements|scripts|.github"


def git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def commits_of(recipe: str) -> list[str]:
    (line,) = re.findall(r"^Done by (.*)\n", RECIPES[recipe], re.MULTILINE)
    return re.findall(r"\b[0-9a-f]{7}\b", line)


def test_the_recipes():
    new = ("scorer", "request field", "task of eval", "attention backend", "touch of vLLM", "version of vLLM")
    assert list(RECIPES) == [f"A new {what}" for what in new]


def test_files_exist():
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", PAGE)
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name).exists() and name != "benchmarks/quality/rows"]


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "A new touch of vLLM"])
def test_commits_match_their_recipes(recipe):
    """The commits are in the history, and each touched a file that its recipe names."""
    commits = commits_of(recipe)
    assert commits
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("needs the history: this is a shallow clone, or no clone")
    files = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", RECIPES[recipe])
    for commit in commits:
        assert git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0, commit
        touched = git("show", "--format=", "--name-only", commit).stdout.split()
        assert [name for name in touched if name.startswith(tuple(files))], commit
