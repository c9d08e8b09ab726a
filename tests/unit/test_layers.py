"""The layer rule: who may import whom. Read from the source, and for the package's root also watched."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STDLIB_ONLY = ["params", "policy", "prompt_usage", "plan", "messages", "metrics", "settings", "options"]
WITH_TORCH = ["scorers", "granularity", "kernels"]
TOOLS = {
    "bench": {"evaluation", "page"},
    "demo_model": set(),
    "evaluation": {"demo_model", "engine_args", "page"},
    "page": set(),
    "sizing": {"demo_model", "kv_cache_spec", "plugin"},
}
"""Stand on the others, as a user would, and see these beside the plain ones; only the command line imports them. The
rest of the server sees `demo_model` alone."""
WITH_VLLM = ["scheduler", "worker", "kv_cache_spec", "plugin"]


def modules() -> dict[str, Path]:
    files = {**package_files("vllm_l2kv", ROOT), **package_files("vllm_l2kv_server", ROOT / "server")}
    assert len(files) > 15
    return files


def package_files(package: str, folder: Path) -> dict[str, Path]:
    files = {}
    for path in (folder / package).rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(module: str) -> str:
    """`vllm_l2kv.worker.cpu` belongs to `worker`."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("vllm_l2kv.")])
def test_imports_of(module):
    imported = imports_of(modules()[module])
    outside = {name.split(".")[0] for name in imported} - {"vllm_l2kv"}
    inside = {part_of(name) for name in imported if name.startswith("vllm_l2kv.")}
    part = part_of(module)
    allowed = set(sys.stdlib_module_names)
    if part in WITH_TORCH:
        allowed |= {"numpy", "torch", "triton"}
        assert inside <= {*STDLIB_ONLY, *WITH_TORCH}
    elif part in WITH_VLLM:
        allowed |= {"torch", "triton", "vllm"}
        assert not inside & set(TOOLS)
    elif part in TOOLS:
        allowed |= {
            "httpx",
            "huggingface_hub",
            "jinja2",
            "lm_eval",
            "matplotlib",
            "numpy",
            "prometheus_client",
            "psutil",
            "scipy",
            "torch",
            "tokenizers",
            "tqdm",
            "transformers",
            "vllm",
            "wonderwords",
        }
        assert inside <= {*STDLIB_ONLY, *WITH_TORCH, *TOOLS[part], part}
    else:
        assert part in STDLIB_ONLY, f"{module} is in no layer"
        assert inside <= set(STDLIB_ONLY)
    assert outside <= allowed
    if part == "scheduler":
        assert "worker" not in inside
        assert "torch" not in outside
    if part == "worker":
        assert "scheduler" not in inside


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("vllm_l2kv_server.")])
def test_the_server_sees_only_the_surface(module):
    inside = {part_of(name) for name in imports_of(modules()[module]) if name.startswith("vllm_l2kv.")}
    tools = set(TOOLS) if module.endswith(".cli") else set()
    plain = {"params", "prompt_usage", "settings", "options", "metrics"}
    surface = plain | {"demo_model", "plugin", "compression", "engine_args", "__version__"}
    assert inside <= surface | tools


def test_importing_the_package_loads_neither_vllm_nor_torch():
    code = (
        "import sys, vllm_l2kv; vllm_l2kv.compression(0.5); print([m for m in ('vllm', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_everything_changes_nothing_of_vllm():
    """No patched attribute: vLLM's classes have the same members before and after."""
    code = """
import importlib, pkgutil
from vllm.v1.core import single_type_kv_cache_manager as a
from vllm.v1.core.sched import async_scheduler as b, scheduler as c
from vllm.v1.worker import block_table as d, gpu_model_runner as e, gpu_worker as f, utils as g, worker_base as h
from vllm.v1 import kv_cache_interface as i
import vllm.v1.worker.cpu_worker as j
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
KVCacheSpecRegistry._ensure_registered()
modules = [a, b, c, d, e, f, g, h, i, j]
def snapshot():
    found = [v for m in modules for v in vars(m).values() if isinstance(v, type)]
    classes = {id(v): v for v in found if v.__module__.startswith("vllm.")}
    return {(k.__qualname__, n): id(v) for k in classes.values() for n, v in vars(k).items()}
before = snapshot()
import vllm_l2kv
for info in pkgutil.walk_packages(vllm_l2kv.__path__, "vllm_l2kv."):
    importlib.import_module(info.name)
from vllm_l2kv.plugin import register
register(); register()
after = snapshot()
changed = [k for k in before if before[k] != after.get(k) and not k[1].startswith(("__", "_abc"))]
print(len(before) > 500, changed)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == "True []"
