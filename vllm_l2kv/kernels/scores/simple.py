"""Scorers that read each row once, and nothing else."""

from typing import Any, ClassVar

import torch

from vllm_l2kv.kernels.batch import Batch
from vllm_l2kv.kernels.one_pass import one_pass
from vllm_l2kv.scorers import Scorer


class Simple:
    """One pass by a function of a tile's rows.

    Attributes:
        score: The function, as of `one_pass`.
    """

    score: ClassVar[Any]

    def __init__(self, scorer: Scorer) -> None:
        """Needs nothing of the scorer."""

    def write(self, batch: Batch, out: torch.Tensor, work: torch.Tensor, raw: bool) -> None:
        """As of `scores.Scored`."""
        one_pass(type(self).score, batch, out, raw=raw)
