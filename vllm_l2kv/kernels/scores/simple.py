"""Kernels of scorers that read each row once, and nothing else."""

from typing import Any, ClassVar

import torch

from vllm_l2kv.kernels.batch import Batch
from vllm_l2kv.kernels.one_pass import one_pass
from vllm_l2kv.scorers import Scorer


class Simple:
    """One pass with a Triton function that scores a tile's rows.

    Attributes:
        score: The function, see `one_pass`.
    """

    score: ClassVar[Any]

    def __init__(self, scorer: Scorer) -> None:
        """Ignores the scorer, which has no parameters."""

    def write(self, batch: Batch, out: torch.Tensor, work: torch.Tensor, raw: bool) -> None:
        """See `scores.Scored`."""
        one_pass(type(self).score, batch, out, raw=raw)
