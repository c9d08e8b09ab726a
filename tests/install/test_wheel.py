"""The wheel alone in an empty environment, without vLLM and other dependencies."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from vllm_l2kv import cli

ROOT = Path(__file__).parents[2]
SOURCES = ["vllm_l2kv", "server", "pyproject.toml", "README.md", "LICENSE"]
BESIDE = ["MANIFEST.in", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "configs", "examples", "requirements"]
"""Files of the source distribution that are not in the wheel."""
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.egg-info")
# The developer's shell and configuration must not affect the tests.
UV = [sys.executable, "-m", "uv", "--quiet", "--offline", "--no-cache", "--no-config"]


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False, **options)


def checked(*command: object, **options: object) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of the files that a build reads, because a build writes beside them."""
    folder = tmp_path_factory.mktemp("sources")
    for name in (*SOURCES, *BESIDE):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=NOT_SOURCES)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def files(sources) -> set[str]:
    """Every file of the two packages, by its path in the wheel."""
    roots = [sources, sources / "server"]
    return {str(path.relative_to(root)) for root in roots for path in root.glob("vllm_l2kv*/**/*") if path.is_file()}


@pytest.fixture(scope="module")
def dist(sources, files, tmp_path_factory) -> Path:
    """The contents of dist/ after `make dist`; `files` are listed before."""
    folder = tmp_path_factory.mktemp("dist")
    checked(*UV, "build", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, sources)
    return folder


@pytest.fixture(scope="module")
def environment(dist, tmp_path_factory) -> Path:
    """The programs of an environment that holds the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    checked(*UV, "venv", "--python", sys.executable, folder)
    checked(*UV, "pip", "install", "--no-deps", "--python", folder / "bin" / "python", *dist.glob("*.whl"))
    return folder / "bin"


def test_the_wheel_holds_the_packages_whole_and_nothing_else(dist, files):
    (wheel,) = dist.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_source_distribution_holds_what_a_build_reads(dist, files):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    server = {f"server/{name}" if name.startswith("vllm_l2kv_server/") else name for name in files}
    assert server | {"pyproject.toml", "README.md", "LICENSE"} <= names
    beside = {name for name in BESIDE if (ROOT / name).is_file()}
    beside |= {f"configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    assert beside | {"examples/lighthouse.txt", "examples/notebooks/4_writing_a_scorer.ipynb"} <= names


def test_it_imports(environment):
    code = "import vllm_l2kv, vllm_l2kv_server, vllm_l2kv.cli; print(vllm_l2kv.__version__, vllm_l2kv.__file__)"
    version, file = checked(environment / "python", "-I", "-c", code).split()
    assert checked(environment / "vllm-l2kv", "--version").split() == ["vllm-l2kv", version]
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert Path(file).is_relative_to(environment.parent)


def test_entry_points_name_modules_of_the_wheel(environment):
    code = (
        "from importlib.metadata import entry_points\n"
        "from importlib.util import find_spec\n"
        "for each in entry_points(name='l2kv'): print(each.group, each.value, find_spec(each.module).origin)"
    )
    found = [line.split() for line in checked(environment / "python", "-I", "-c", code).splitlines()]
    assert sorted((group, value) for group, value, _ in found) == [
        ("vllm.endpoint_plugins", "vllm_l2kv_server.app:KVCompressionEndpoints"),
        ("vllm.general_plugins", "vllm_l2kv.plugin:register"),
    ]
    assert all(Path(origin).is_relative_to(environment.parent) for _, _, origin in found)


def test_help_needs_no_other_package(environment):
    text = checked(environment / "vllm-l2kv", "--help")
    for command in cli.NEEDS:
        assert re.search(rf"^    {command.split()[0]}\s", text, re.MULTILINE), command


@pytest.mark.parametrize("command", cli.NEEDS)
def test_a_command_says_in_one_line_what_to_install(environment, command):
    done = run(environment / "vllm-l2kv", *command.split())
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vllm-l2kv {command.split()[0]}: error: the package ")
    assert "install vllm-l2kv[" in line


def test_sources_that_nothing_installed_import(sources):
    code = f"import sys; sys.path.insert(0, {str(sources)!r}); import vllm_l2kv; print(vllm_l2kv.__version__)"
    shutil.rmtree(sources / "vllm_l2kv.egg-info", ignore_errors=True)  # left by a build
    assert checked(sys.executable, "-I", "-S", "-c", code) == "0+unknown\n"
