"""`test_runner_v2.py` with our kernels instead of loops, and `test_by_head.py`. In a process of their own, as in
`test_interpreted.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = [str(Path(__file__).with_name(name)) for name in ("test_runner_v2.py", "test_by_head.py")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels here")
def test_runner_v2_in_tritons_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *TESTS],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
