"""Device memory that the kernels use in addition to the cache."""

from typing import NamedTuple

import torch

from vllm_l2kv.kernels import ranks
from vllm_l2kv.kernels.scores import keydiff

MAX_ORDERS = 64
"""Most orders of one launch."""


class Scratch(NamedTuple):
    """Memory that each launch reuses; several compactors may share it.

    Attributes:
        scores: int32, one for each row and selection; later the kept positions.
        work: int32, work memory of the scorers.
    """

    scores: torch.Tensor
    work: torch.Tensor

    @classmethod
    def of(cls, num_selections: int, head_size: int, max_num_tokens: int, device: torch.device) -> "Scratch":
        """Allocates enough memory for the longest request.

        Args:
            num_selections: Heads of all layers together.
            head_size: Elements of a key.
            max_num_tokens: Rows of the longest request.
            device: Device of the kernels.
        """
        sizes = _sizes(num_selections, head_size, max_num_tokens)
        return cls(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))


def scratch_bytes(num_selections: int, head_size: int, max_num_tokens: int) -> int:
    """Device memory of `Scratch.of`, in bytes."""
    return 4 * sum(_sizes(num_selections, head_size, max_num_tokens))


def _sizes(num_selections: int, head_size: int, max_num_tokens: int) -> tuple[int, int]:
    of_keydiff = keydiff.work_numbers(MAX_ORDERS, num_selections, max_num_tokens, head_size)
    return num_selections * max_num_tokens, max(of_keydiff, ranks.work_numbers(num_selections, max_num_tokens))
