"""A plugin of pytest (`-p interpret_vllm`): vLLM's own kernels in Triton's interpreter too, on machines without a GPU.

When it is imported vLLM looks whether Triton has a driver: its build for CPUs for a backend of the name, others for a
GPU, unless none is to be seen. With `TRITON_INTERPRET=1` nothing is asked of it.
"""

import os
from types import SimpleNamespace

from triton.backends import backends

if os.environ.get("TRITON_INTERPRET") == "1":
    backends.setdefault("cpu", SimpleNamespace(driver=None, compiler=None))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
