"""Fixtures for tests of images, dashboards and replicas."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Path of a program that `make setup` installs."""

    def find(name: str) -> str:
        beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        found = shutil.which(name, path=beside_python)
        if found is None:
            pytest.skip(f"{name} is not installed: run make setup")
        return found

    return find


@pytest.fixture(scope="session")
def prometheus_folder() -> Path:
    """Folder of `prometheus` and `promtool`."""
    script = [sys.executable, str(ROOT / "scripts" / "prometheus.py")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    return Path(done.stdout.strip())
