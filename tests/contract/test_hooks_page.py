"""`docs/vllm_hooks.md` names everything of vLLM that the packages touch, and nothing else.

A failure says what to do: which row is missing, or which name of a row its modules no longer have.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from overrides import classes, is_vllms, overrides

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "vllm_hooks.md"
PACKAGES = {"vllm_l2kv": ROOT / "vllm_l2kv", "vllm_l2kv_server": ROOT / "server" / "vllm_l2kv_server"}
TOOLS = ("tools",)
NOT_OF_VLLM = [
    PACKAGES["vllm_l2kv"] / "tools" / name for name in ("demo_model.py", "bench/cli.py", "evaluation/cli.py")
]
"""Modules that set attributes of a tokenizer, of a model's settings, or of options of the project's commands."""
REPLACED, CHANGED = "Replaced objects", "Changed attributes"


# --- the page


class Row(NamedTuple):
    """A row.

    Attributes:
        section: The heading above it.
        line: Its number.
        names: Identifiers of vLLM between backticks.
        owners: Those of them that only qualify an attribute, such as `BlockPool` in `BlockPool.free_blocks`.
        modules: Modules that touch them.
    """

    section: str
    line: int
    names: frozenset[str]
    owners: frozenset[str]
    modules: tuple[str, ...]

    def __str__(self) -> str:
        return f"{PAGE.name}:{self.line}"


@cache
def rows() -> tuple[Row, ...]:
    found, section = [], ""
    for number, line in enumerate(PAGE.read_text().splitlines(), 1):
        if line.startswith("## "):
            section = line.removeprefix("## ")
        if not line.startswith("| ") or line.startswith("| symbol"):
            continue
        symbols, where, *rest = (cell.strip() for cell in line.strip("|").split(" | "))
        assert len(rest) == 2, f"{PAGE.name}:{number} has {2 + len(rest)} cells"
        quoted = " ".join(re.findall(r"`([^`]+)`", symbols))
        names, owners = (frozenset(re.findall(pattern, quoted)) for pattern in (r"\w+", r"\b[A-Z]\w+(?=\.\w)"))
        found.append(Row(section, number, names, owners, tuple(re.findall(r"`([^`]+)`", where))))
    return tuple(found)


def files_of(module: str) -> list[Path]:
    """Returns the files of a name: `worker.cpu` is a file of either package, `scheduler` a folder."""
    if (ROOT / module).is_file():
        return [ROOT / module]
    found = []
    for folder in PACKAGES.values():
        path = folder / module.replace(".", "/")
        found += [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else sorted(path.rglob("*.py"))
    return found


def has_row(name: str, path: Path, section: str | None = None) -> bool:
    return any(
        name in row.names and (section is None or row.section == section) and path in files_of(module)
        for row in rows()
        for module in row.modules
    )


# --- the code


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))}


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def is_core(path: Path) -> bool:
    """Whether a module runs inside vLLM's engine, where nearly every object is vLLM's or the project's."""
    return PACKAGES["vllm_l2kv"] in path.parents and path.relative_to(PACKAGES["vllm_l2kv"]).parts[0] not in TOOLS


def imports(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            # Modules with equal names are distinguished by their package, as in `completion.api_router`.
            yield from ((alias.name, node) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[-1], node) for alias in node.names if alias.name.startswith("vllm."))


def is_wrapper(node: ast.AST) -> bool:
    """Whether a class passes unknown attributes on to another object."""
    return isinstance(node, ast.ClassDef) and "__getattr__" in {getattr(child, "name", None) for child in node.body}


@cache
def names_of_vllm(cls: type) -> frozenset[str]:
    """Returns the attributes that instances have from vLLM's classes among a class's bases."""
    names: set[str] = set()
    for base in filter(is_vllms, cls.__mro__):
        names |= {*vars(base), *getattr(base, "__annotations__", {})}
        names |= set(re.findall(r"\bself\.(\w+)(?:\s*:[^=\n]+)?(?:, self\.\w+)*\s*=[^=]", inspect.getsource(base)))
    return frozenset(names)


@cache
def own_names(core: bool) -> frozenset[str]:
    """Returns the attributes that the project's classes define and their bases in vLLM do not."""
    names: set[str] = set()
    of_class = {cls.__qualname__: names_of_vllm(cls) for cls in classes()}
    for path, tree in trees().items():
        if core and not is_core(path):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names |= _defined(node) - of_class.get(node.name, frozenset())
            elif isinstance(node, ast.FunctionDef) and node in tree.body:
                names.add(node.name)
    return frozenset(names)


def _defined(cls: ast.ClassDef) -> set[str]:
    names = set()
    for node in ast.walk(cls):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign) and node in cls.body:  # an enumeration's members
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return names


@cache
def names_of_others() -> frozenset[str]:
    """Returns the attributes of Python and torch that the core reads."""
    import logging

    import numpy
    import torch

    others = (
        dict,
        bytes,
        int,
        list,
        str,
        set,
        logging,
        logging.Logger,
        inspect,
        inspect.Signature,
        numpy,
        torch,
        torch.Tensor,
        torch.Generator,
        torch.cuda,
    )
    return frozenset(name for other in others for name in dir(other))


def written(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Returns the attributes that are assigned, or whose items are."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            pending = list(node.targets if isinstance(node, ast.Assign) else [node.target])
            while pending:
                target = pending.pop()
                if isinstance(target, ast.Attribute):
                    yield target.attr, node
                pending += getattr(target, "elts", [target.value] if hasattr(target, "value") else [])


# --- the one against the other


def test_the_page_is_read():
    assert len(rows()) > 90
    assert len({row.section for row in rows()}) >= 8


@pytest.mark.parametrize("row", rows(), ids=str)
def test_every_name_of_a_row_occurs_where_it_says(row):
    """If this fails, remove or correct the row."""
    texts = {module: "".join(path.read_text() for path in files_of(module)) for module in row.modules}
    assert row.modules, "the row names no module"
    missing = [module for module, text in texts.items() if not text]
    assert not missing, "no such module"
    words = {module: set(re.findall(r"\w+", text)) for module, text in texts.items()}
    assert row.names - row.owners <= set().union(*words.values()), "names that these modules do not have"
    assert all(row.names & found for found in words.values()), "modules that have none of these names"


def test_every_import_has_a_row():
    found = [(name, path, node) for path, tree in trees().items() for name, node in imports(tree)]
    assert len(found) > 60
    lost = [f"{where(path, node)} imports {name}" for name, path, node in found if not has_row(name, path)]
    assert not lost, "add rows, or modules to rows"


def test_every_override_has_a_row():
    assert len(overrides()) > 25
    lost = [
        f"{cls.__module__}.{cls.__name__}.{name}"
        for cls, name in overrides()
        if not has_row(name, Path(inspect.getfile(cls)))
    ]
    assert not lost, "add rows, or modules to rows"


def test_every_wrapper_object_has_a_row():
    """The section of replaced objects has a row for each, and some row has each method that it answers."""
    ours = [(path, node) for path, tree in trees().items() for node in ast.walk(tree) if is_wrapper(node)]
    listed = {name for row in rows() if row.section == REPLACED for name in row.names}
    assert len(ours) >= 3
    assert {node.name for _, node in ours} <= listed, f"add rows to {REPLACED!r}"
    lost = [
        f"{where(path, child)} {node.name}.{child.name}"
        for path, node in ours
        for child in node.body
        if isinstance(child, ast.FunctionDef) and not child.name.startswith("_")
        if child.name in own_names(core=False) and _is_asked_for(child.name) and not has_row(child.name, path)
    ]
    assert not lost, "add rows, or modules to rows"


@cache
def _vllm_text() -> str:
    import vllm

    folder = Path(vllm.__file__).parent
    parts = ("v1/core", "v1/worker", "v1/engine", "entrypoints/openai", "entrypoints/serve")
    return "".join(path.read_text() for part in parts for path in (folder / part).rglob("*.py"))


def _is_asked_for(name: str) -> bool:
    """Whether vLLM calls a method of this name."""
    return re.search(rf"\.{name}\(", _vllm_text()) is not None


def test_every_attribute_of_vllm_that_is_set_is_listed():
    """Assigning to a name that vLLM no longer has raises no error, so `Changed attributes` lists every one."""
    lost = [
        f"{where(path, node)} sets {name}"
        for path, tree in trees().items()
        for name, node in written(tree)
        if path not in NOT_OF_VLLM and name not in own_names(core=False)
        if not (has_row(name, path, REPLACED) or has_row(name, path, CHANGED))
    ]
    assert not lost, f"add rows to {CHANGED!r}"


def test_every_attribute_that_the_core_reads_is_listed():
    lost = {
        f"{path.relative_to(ROOT)} reads {node.attr}"
        for path, tree in trees().items()
        if is_core(path) and list(imports(tree))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr not in own_names(core=True) | names_of_others()
        if not has_row(node.attr, path)
    }
    assert not lost, "add names or modules to rows"
