"""The layer rule: which part may import which. Read from the source; the package's root is also imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STDLIB_ONLY = [
    "field_kinds",
    "params",
    "policy",
    "block_math",
    "capacity",
    "messages",
    "settings",
    "kv_heads",
    "cli_types",
    "supported_vllm",
    "log",
]
WITH_TORCH = ["profile", "scorers", "token_groups", "kernels"]
WITH_VLLM = ["scheduler", "worker", "kv_cache_spec", "plugin", "refusals", "seams"]
WATCHED = ("engine_log", "options", "progress")
"""Modules that slow commands share."""
TOOLS = {
    "bench": {"tools.evaluation", "tools.html_report"},
    "demo_model": {"tools.user_cache"},
    "engine_log": {"tools.options", "tools.progress"},
    "evaluation": {"engine_args", *(f"tools.{name}" for name in ("demo_model", "html_report", "plan", *WATCHED))},
    "html_report": set(),
    "options": {"tools.demo_model"},
    "user_cache": {"log"},
    "progress": set(),
    "profile": {"__version__", *(f"tools.{name}" for name in ("demo_model", "evaluation", "html_report", *WATCHED))},
    "plan": {"tools.demo_model", "tools.options", "kv_cache_spec", "plugin", "refusals", "seams"},
}
"""Parts that tools may import in addition to the plain modules."""
COMMAND = "cli"
"""The part that imports subcommands, and tools without a parser."""


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
    """Returns a module's part: `worker` for `vllm_l2kv.worker.cpu`, `tools.bench` for `vllm_l2kv.tools.bench.run`."""
    _, part, tool = [*module.split("."), "", ""][:3]
    return f"tools.{tool}" if part == "tools" else part


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("vllm_l2kv.")])
def test_imports_of(module):
    imported = imports_of(modules()[module])
    outside = {name.split(".")[0] for name in imported} - {"vllm_l2kv"}
    inside = {part_of(name) for name in imported if name.startswith("vllm_l2kv.")}
    part, tool = part_of(module), part_of(module).removeprefix("tools.")
    allowed = set(sys.stdlib_module_names)
    if part in WITH_TORCH:
        allowed |= {"huggingface_hub", "numpy", "safetensors", "torch", "triton"}
        assert inside <= {*STDLIB_ONLY, *WITH_TORCH}
    elif part in WITH_VLLM:
        allowed |= {"numpy", "torch", "triton", "vllm"}
        assert inside <= {*STDLIB_ONLY, *WITH_TORCH, *WITH_VLLM}
    elif part == COMMAND:
        allowed |= {"vllm_l2kv_server"}
        assert inside <= {"__version__", "supported_vllm", *(f"tools.{name}" for name in TOOLS)}
    elif tool in TOOLS:
        allowed |= {
            "PIL",
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
        assert inside <= {*STDLIB_ONLY, *WITH_TORCH, *TOOLS[tool], part}
    else:
        assert part in STDLIB_ONLY or module == "vllm_l2kv.tools", f"{module} is in no layer"
        assert inside <= set(STDLIB_ONLY)
    assert outside <= allowed
    if part == "scheduler":
        assert "worker" not in inside
        assert "torch" not in outside
    if part == "worker":
        assert "scheduler" not in inside
    if part == "refusals":
        assert not inside & {"plugin", "scheduler", "worker"}
    if part in ("scheduler", "worker"):
        assert "plugin" not in inside


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("vllm_l2kv_server.")])
def test_the_server_imports_only_the_public_modules(module):
    inside = {part_of(name) for name in imports_of(modules()[module]) if name.startswith("vllm_l2kv.")}
    plain = {"field_kinds", "params", "policy", "capacity", "messages", "settings", "cli_types", "supported_vllm"}
    plain |= {"log", "profile", "compression", "engine_args", "__version__"}
    tools = {f"tools.{name}" for name in ("demo_model", "engine_log", "progress", "user_cache")}
    assert inside <= plain | tools | {"refusals"}


def test_importing_the_package_loads_neither_vllm_nor_torch():
    code = (
        "import sys, vllm_l2kv; vllm_l2kv.compression(0.5); print([m for m in ('vllm', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_everything_changes_nothing_of_vllm():
    """Nothing is patched: functions and classes of vLLM, and their members, are the same before and after."""
    code = """
import importlib, pkgutil, sys, vllm.v1.worker.gpu
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
KVCacheSpecRegistry._ensure_registered()
names = [f"vllm.v1.{name}" for name in (
    "core.block_pool", "core.kv_cache_coordinator", "core.kv_cache_manager", "core.kv_cache_utils",
    "core.sched.async_scheduler", "core.sched.output", "core.sched.scheduler", "core.single_type_kv_cache_manager",
    "engine.async_llm", "engine.core", "engine.output_processor", "kv_cache_interface", "metrics.loggers",
    "metrics.stats", "outputs", "request", "worker.block_table", "worker.cpu_worker", "worker.gpu_model_runner",
    "worker.gpu_worker", "worker.utils", "worker.worker_base")]
names += [info.name for info in pkgutil.walk_packages(vllm.v1.worker.gpu.__path__, "vllm.v1.worker.gpu.")]
modules = [importlib.import_module(name) for name in names]
def snapshot():
    found = {(m.__name__, n): v for m in modules for n, v in vars(m).items() if callable(v)}
    classes = {v for v in found.values() if isinstance(v, type) and v.__module__.startswith("vllm.")}
    members = {(k.__module__, k.__qualname__, n): id(v) for k in classes for n, v in vars(k).items()}
    return {key: id(v) for key, v in found.items()} | members
before = snapshot()
import vllm_l2kv, vllm_l2kv_server
for package in (vllm_l2kv, vllm_l2kv_server):
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(info.name)
from vllm_l2kv.plugin import register
register(); register()
after = snapshot()
changed = [key for key in before if before[key] != after.get(key) and not key[-1].startswith(("__", "_abc"))]
print(len(modules), len(before), changed)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    num_modules, num_names, changed = result.stdout.strip().splitlines()[-1].split(maxsplit=2)
    assert int(num_modules) > 50
    assert int(num_names) > 5000
    assert changed == "[]"
