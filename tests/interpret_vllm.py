"""A plugin of pytest (`-p interpret_vllm`): runs vLLM's own kernels too in Triton's interpreter, without a GPU.

On import vLLM checks that Triton has a driver: its CPU build looks for a backend of that name, other builds for a GPU
unless none is visible. With `TRITON_INTERPRET=1` no driver is needed.
"""

import os
from types import SimpleNamespace

from triton.backends import backends

if os.environ.get("TRITON_INTERPRET") == "1":
    backends.setdefault("cpu", SimpleNamespace(driver=None, compiler=None))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
