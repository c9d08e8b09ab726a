"""`test_runner_v2.py` with our kernels instead of loops. In a process of its own, as in `test_interpreted.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).with_name("test_runner_v2.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels here")
def test_runner_v2_in_tritons_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(TESTS)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
