"""Compaction of the paged KV cache: the kept rows are moved into fewer blocks. Each implementation is a module.

`reference` is plain torch and the ground truth; `triton_compactor`, for GPUs, must equal it.
"""

from collections.abc import Sequence
from typing import Protocol

from vllm_l2kv.messages.orders import CompactionOrder


class Compactor(Protocol):
    """Compacts layers of one KV-cache group."""

    def compact(self, orders: Sequence[CompactionOrder]) -> None:
        """Carries out the orders of one step."""
