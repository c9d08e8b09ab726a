"""`test_runner_v2.py` with the real kernels in place of loops, and tests that need these. In a separate process, as
in `test_interpreted.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NAMES = (
    "test_runner_v2.py",
    "test_runner_v2_drafts.py",
    "test_by_head.py",
    "test_triton_attention.py",
    "test_flashinfer_plan.py",
)
TESTS = [str(Path(__file__).with_name(name)) for name in NAMES]
PLUGINS = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels here")
def test_runner_v2_in_tritons_interpreter():
    paths = [str(PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "interpret_vllm", "-q", "-x", *TESTS],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
