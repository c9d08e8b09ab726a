"""pyproject.toml declares exactly the packages that are imported."""

import ast
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vllm_l2kv import cli

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = ROOT / "vllm_l2kv" / "tools"
EXTRAS = {
    "bench": [*(TOOLS / "bench").rglob("*.py"), TOOLS / "html_report.py"],
    "eval": [
        *(TOOLS / "evaluation").rglob("*.py"),
        *(TOOLS / "profile").rglob("*.py"),
        TOOLS / "html_report.py",
    ],
}
"""Modules that need an extra."""
WITH_VLLM = {"PIL", "tokenizers", "torch", "transformers", "triton", "vllm"}
"""Imports that come with vLLM, in the versions that it needs."""


def imports(modules: Iterable[Path]) -> set[str]:
    """Returns the external packages that some modules import anywhere, by import name."""
    names = set()
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            match node:
                case ast.Import(names=aliases):
                    names |= {alias.name.partition(".")[0] for alias in aliases}
                case ast.ImportFrom(module=str(name), level=0):
                    names.add(name.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"vllm_l2kv", "vllm_l2kv_server"} - WITH_VLLM


def base_imports() -> set[str]:
    """Returns the packages imported outside the modules that need an extra."""
    sources = [*(ROOT / "vllm_l2kv").rglob("*.py"), *(ROOT / "server" / "vllm_l2kv_server").rglob("*.py")]
    return imports(set(sources) - {module for modules in EXTRAS.values() for module in modules})


def distributions(packages: Iterable[str]) -> set[str]:
    """Returns the names under which packages are declared."""
    known = packages_distributions()
    return {canonicalize_name(known[package][0]) for package in packages}


def declared(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def test_dependencies_are_the_imported_packages():
    assert declared(PROJECT["dependencies"]) == distributions(base_imports())


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_has_the_further_imports_of_its_tool(extra):
    assert declared(PROJECT["optional-dependencies"][extra]) == distributions(imports(EXTRAS[extra]) - base_imports())


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_command_checks_the_packages_of_its_extra(extra):
    looked_for = {name for needs in cli.NEEDS.values() for name, install in needs.items() if install == f"[{extra}]"}
    assert looked_for == imports(EXTRAS[extra]) - base_imports()


def test_vllm_requires_the_packages_left_to_it():
    vllm = declared(requires(packages_distributions()["vllm"][0]) or ())
    assert distributions(WITH_VLLM - {"vllm", "triton"}) <= vllm
    assert "xgrammar" in vllm
    assert "triton" in declared(requires("xgrammar") or ())
