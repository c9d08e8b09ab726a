"""Moving kept rows of the paged KV cache, one implementation a module.

`reference` is plain torch and the ground truth; `triton_compactor`, for GPUs, must equal it.
"""

from collections.abc import Sequence
from typing import Protocol

from vllm_l2kv.messages.orders import CompactionOrder


class Compactor(Protocol):
    """Moves the kept rows of layers of one KV-cache group."""

    def compact(self, orders: Sequence[CompactionOrder]) -> None:
        """Carries out one step's orders."""
