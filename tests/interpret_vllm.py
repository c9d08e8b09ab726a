"""A plugin of pytest (`-p interpret_vllm`): vLLM's own kernels in Triton's interpreter too, on machines without a GPU.

vLLM for CPUs uses Triton only if that has a backend of the name, and looks when it is imported. With
`TRITON_INTERPRET=1` nothing is asked of the backend.
"""

import os
from types import SimpleNamespace

from triton.backends import backends

if os.environ.get("TRITON_INTERPRET") == "1":
    backends.setdefault("cpu", SimpleNamespace(driver=None, compiler=None))
