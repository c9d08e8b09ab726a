"""Tests the kernels' index arithmetic on machines without a GPU.

In separate processes, since Triton decides on import whether kernels are interpreted.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

TESTS = [str(Path(__file__).with_name(name)) for name in ("test_triton.py", "test_head_pages.py")]
HALVES = ("scores", "not scores")
"""Parts of about the same duration, run side by side."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton.py runs the compiled kernels here")
def test_kernels_in_tritons_interpreter():
    with ThreadPoolExecutor() as pool:
        for result in pool.map(interpret, HALVES):
            assert result.returncode == 0, result.stdout + result.stderr
            assert " passed" in result.stdout
            assert "skipped" not in result.stdout


def interpret(chosen: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *TESTS, "-k", chosen],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
