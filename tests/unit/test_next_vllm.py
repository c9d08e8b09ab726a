"""The vLLM of `make test-next`."""

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib import util
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "next_vllm.py"


def load_script():
    spec = util.spec_from_file_location("next_vllm", SCRIPT)
    script = util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_it_is_newer_than_the_installed_one_and_supported():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (cuda,) = (each.specifier for each in map(Requirement, extras["cuda"]) if each.name == "vllm")
    (installed,) = (pin.version for text in extras["cpu"] if "vllm" in text for pin in Requirement(text).specifier)
    version = Version(load_script().VERSION)
    assert version in cuda
    assert version > Version(installed)
    assert Version(f"{version.major}.{version.minor + 1}") not in cuda, "there is a newer one to take"


def test_a_wheel_of_another_hash_is_refused(tmp_path):
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl", "w") as wheel:
        wheel.writestr("vllm/__init__.py", "")
        wheel.writestr("vllm-0.33.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
    environ = {**os.environ, "XDG_CACHE_HOME": str(cache), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    environ["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run([sys.executable, SCRIPT], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("next_vllm: pip could not fetch vllm==0.33.0 for CUDA")
    assert done.stdout == ""
    assert list((cache / "vllm-l2kv").iterdir()) == []


def test_only_what_tests_need_is_kept(tmp_path, monkeypatch):
    script = load_script()
    wheel = tmp_path / "vllm.whl"
    kept = {"vllm/a.py", "vllm/b/c.json", "vllm-0.33.0.dist-info/METADATA"}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*kept, "vllm/_C.abi3.so", "vllm/third_party/x.h"):
            archive.writestr(name, "")
    monkeypatch.setattr(script, "_download", lambda scratch: wheel)
    folder = script.ensure_next_vllm(tmp_path / "cache")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == kept
    monkeypatch.setattr(script, "_download", None)
    assert script.ensure_next_vllm(tmp_path / "cache") == folder
