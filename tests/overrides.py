"""Methods of this project that override vLLM's."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

PACKAGES = ("vllm_l2kv", "vllm_l2kv_server")


@cache
def classes() -> tuple[type, ...]:
    """Returns all classes of both packages."""
    found = []
    for package in PACKAGES:
        for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            module = importlib.import_module(info.name)
            found += [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == info.name]
    return tuple(found)


def is_vllms(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "vllm"


@cache
def overrides() -> dict[tuple[type, str], tuple[Callable[..., Any], ...]]:
    """Maps class and method name to the overridden methods of vLLM, one for each base."""
    found: dict[tuple[type, str], dict[Callable[..., Any], None]] = {}
    for cls in classes():
        theirs: dict[str, Any] = {}
        for base in filter(is_vllms, cls.__mro__):
            theirs = vars(base) | theirs
        for base in cls.__mro__:
            for name, value in vars(base).items() if base in classes() else ():
                # Pydantic adds its own methods.
                is_ours = inspect.isroutine(value) and getattr(value, "__module__", "") == base.__module__
                if is_ours and name in theirs and not name.startswith("__"):
                    found.setdefault((base, name), {})[getattr(theirs[name], "__func__", theirs[name])] = None
    return {override: tuple(replaced) for override, replaced in found.items()}
