"""Guards the kernels' index arithmetic on machines without a GPU.

In a process of its own: Triton decides when it is imported whether kernels are interpreted.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton.py runs the compiled kernels here")
def test_kernels_in_tritons_interpreter():
    tests = Path(__file__).with_name("test_triton.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
