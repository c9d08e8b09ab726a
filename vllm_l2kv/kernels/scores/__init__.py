"""Triton kernels of the scorers, one scorer per file. Their scores must equal those of `vllm_l2kv.scorers`.

Each module has a class `Kernels` with the interface `Scored`. Most scorers read each row once and only need a function
`score`, which `one_pass` launches.
"""

from importlib import import_module
from typing import Any, Protocol

import torch

from vllm_l2kv.kernels.batch import Batch
from vllm_l2kv.params import OFFERED_SCORERS
from vllm_l2kv.scorers import Scorers


class Scored(Protocol):
    """The kernels of one scorer."""

    def __init__(self, scorer: Any) -> None:
        """Takes the bound scorer from `vllm_l2kv.scorers`."""

    def write(self, batch: Batch, out: torch.Tensor, work: torch.Tensor, raw: bool) -> None:
        """Scores the rows of a batch.

        Args:
            batch: The orders.
            out: `[num_selections * num_rows]` int32, written: by order, then by layer and head, then by row.
            work: int32 work memory, see `Scratch.work`; free after the call.
            raw: Whether to write the scores, as bits of fp32, instead of `batch.selection_keys`.
        """


def bind(scorers: Scorers) -> dict[str, Scored]:
    """The kernels of bound scorers, by the scorers' names."""
    return {name: kernels_of(name)(scorer) for name, scorer in scorers.items()}


def kernels_of(name: str) -> type[Scored]:
    """The class `Kernels` of a scorer."""
    module = name if name in OFFERED_SCORERS else "by_torch"
    kernels: type[Scored] = import_module(f"vllm_l2kv.kernels.scores.{module}").Kernels
    return kernels
