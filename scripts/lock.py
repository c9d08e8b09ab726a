"""Writes requirements/cpu.txt: every package of a CPU set-up, runtime and development, pinned.

The roots are what vLLM's CPU build asks for, less the packages below, and what this project asks for. Pins of the
present lock stay unless `--upgrade` is given. Run it with the set-up's own Python (`make lock`), with pip told of an
index that has CPU builds of torch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.txt"

# Text models never use these, and their PyPI builds do not import beside a CPU build of torch.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}

# Tests call functions of these, which need nothing of what their metadata asks for.
WITHOUT_DEPENDENCIES = ["kvpress==0.5.5"]

PYTHONS = ("3.11", "3.12")

HEADER = """\
# Every package of a CPU set-up of vllm-l2kv, runtime and development: x86-64 Linux, Python 3.11 or 3.12.
# Install with `pip install --no-deps -r requirements/cpu.txt` (`make setup` does): with dependencies pip would add
# torchvision, torchaudio and torchcodec, which vLLM's metadata asks for, text models do not need, and whose
# PyPI builds do not import beside a CPU build of torch.
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


def applies(requirement: Requirement) -> bool:
    """Whether a requirement holds for this machine with any Python that we support, without extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": "", "python_version": python}) for python in PYTHONS)


def asked_for() -> list[str]:
    """What pyproject.toml asks of a CPU set-up, to build, to develop, to evaluate and to load."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, extras = pyproject["project"], pyproject["project"]["optional-dependencies"]
    set_up = (requirement for extra in ("cpu", "dev", "eval", "bench") for requirement in extras[extra])
    return [*project["dependencies"], *set_up, *pyproject["build-system"]["requires"]]


def asked_for_by(distribution: dict[str, Any]) -> list[str]:
    """What a distribution asks for on this machine, less the packages left out."""
    wanted = []
    for text in distribution["metadata"]["requires_dist"]:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) not in LEFT_OUT and applies(requirement):
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def main() -> None:
    """Resolves and writes the lock."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions instead of the present pins")
    upgrade = parser.parse_args().upgrade

    constraints = [] if upgrade or not LOCK.exists() else ["--constraint", str(LOCK)]
    wanted = asked_for()
    (vllm,) = resolve("--no-deps", *(requirement for requirement in wanted if requirement.startswith("vllm")))
    others = [requirement for requirement in wanted if not requirement.startswith("vllm")]
    alone = resolve("--no-deps", *WITHOUT_DEPENDENCIES)
    installs = [vllm, *alone, *resolve(*constraints, *others, *asked_for_by(vllm))]
    # The local part of a version (2.13.0+cpu) names a build, and which one there is depends on the package index.
    pins = {item["metadata"]["name"]: Version(item["metadata"]["version"]).public for item in installs}
    if found := {canonicalize_name(name) for name in pins} & LEFT_OUT:
        sys.exit(f"A package asks for {', '.join(sorted(found))}, which must stay out of the lock.")
    lines = [f"{name}=={version}" for name, version in sorted(pins.items(), key=lambda pin: pin[0].lower())]
    LOCK.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages in {LOCK.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
