"""Releases: the workflow that a tag starts, and the files that have the version."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from scripts.release import check, notes, places, prepare
from vllm_l2kv.supported_vllm import FIRST, FIRST_BEYOND

CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- B.\n\n## [0.1.0] - 2026-01-02\n\n- A.\n"


@pytest.fixture
def copy(root, tmp_path) -> Path:
    """A copy of the files that have the version, with a changelog of two sections."""
    for path in places(root):
        there = tmp_path / path.relative_to(root)
        there.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(path, there)
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


def test_a_release_is_prepared(copy):
    prepare(copy, "9.8.7")
    check(copy, "9.8.7")
    assert notes(copy, "9.8.7") == "### Added\n\n- B.\n"
    assert notes(copy, "0.1.0") == "- A.\n"
    assert re.search(r"## \[Unreleased\]\n\n## \[9\.8\.7\] - \d{4}-\d\d-\d\d\n", (copy / "CHANGELOG.md").read_text())
    assert 'version = "9.8.7"' in (copy / "pyproject.toml").read_text()
    images = yaml.safe_load((copy / "docker" / "compose.yaml").read_text())["services"]
    assert [images[name]["image"] for name in ("server", "server-cpu")] == ["vllm-l2kv:9.8.7", "vllm-l2kv:9.8.7-cpu"]


def test_a_tag_of_another_version_is_refused(copy):
    with pytest.raises(ValueError, match=r"pyproject\.toml names .*, not 9\.8\.7"):
        check(copy, "9.8.7")
    prepare(copy, "9.8.7")
    with pytest.raises(ValueError, match="no changes under"):
        prepare(copy, "9.8.8")
    (copy / "CHANGELOG.md").write_text(CHANGELOG)
    with pytest.raises(ValueError, match=r"no section \[9\.8\.7\]"):
        check(copy, "9.8.7")
    with pytest.raises(ValueError, match=r"section \[0\.1\.0\] already"):
        prepare(copy, "0.1.0")


def test_all_files_have_one_version(root):
    """No other file has it."""
    (version,) = {match[2] for path, place in places(root).items() for match in place.finditer(path.read_text())}
    files = [path for folder in ("docker", "configs") for path in (root / folder).rglob("*.yaml")]
    assert {path for path in files if version in path.read_text()} <= places(root).keys()


class TestTheWorkflow:
    @pytest.fixture(scope="class")
    def file(self, root) -> Path:
        return root / ".github" / "workflows" / "release.yml"

    @pytest.fixture(scope="class")
    def jobs(self, file):
        return yaml.safe_load(file.read_text())["jobs"]

    def test_schema(self, tool, file):
        command = [tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout

    def test_actions_are_pinned(self, file):
        """By commit, with the version beside it."""
        used = re.findall(r"uses: (.*)", file.read_text())
        assert len(used) > 5
        assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each) for each in used), used

    def test_permissions_are_the_least(self, file, jobs):
        assert yaml.safe_load(file.read_text())["permissions"] == {}
        assert {name: job["permissions"] for name, job in jobs.items()} == {
            "build": {"contents": "read"},
            "pypi": {"id-token": "write"},
            "images": {"contents": "read"},
            "release": {"contents": "write"},
        }

    def test_nothing_is_published_untested(self, jobs):
        assert (jobs["pypi"]["needs"], jobs["images"]["needs"], jobs["release"]["needs"]) == ("build", "build", "pypi")
        assert ".ci/run" in [step.get("run") for step in jobs["build"]["steps"]]

    def test_commands_contain_no_expressions(self, jobs):
        """Expressions reach a shell as variables only."""
        runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        assert len(runs) > 5
        assert not [run for run in runs if "${{" in run]

    def test_images_are_of_every_version_of_vllm(self, root, jobs):
        built = jobs["images"]["strategy"]["matrix"]["include"]
        assert all((root / each["dockerfile"]).is_file() for each in built)
        versions = {each["build-args"].removeprefix("VLLM_VERSION=") for each in built if "VLLM" in each["build-args"]}
        minors = range(FIRST[1], FIRST_BEYOND[1])
        assert versions == {f"{FIRST[0]}.{minor}.0" for minor in minors}
