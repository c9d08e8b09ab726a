"""Scores by Triton, one scorer a file: `vllm_l2kv.scorers` defines what each of them must equal.

A module has a class `Kernels`, bound to a bound scorer as `Scored` says. Most read each row once and need only a
`score` of their own, which `one_pass` launches.
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
        """Takes the bound scorer, one of `vllm_l2kv.scorers`."""

    def write(self, batch: Batch, out: torch.Tensor, work: torch.Tensor, raw: bool) -> None:
        """Scores the rows of a batch.

        Args:
            batch: The orders.
            out: `[num_selections * num_rows]` int32, written: orders, then their layers and heads, then their rows.
            work: int32, as long as `work_bytes` says; free after the call.
            raw: Whether to write the scores, as the bits of fp32, instead of `batch.selection_keys`.
        """


def bind(scorers: Scorers) -> dict[str, Scored]:
    """The kernels of bound scorers, by their names."""
    return {name: kernels_of(name)(scorer) for name, scorer in scorers.items()}


def kernels_of(name: str) -> type[Scored]:
    """The class of a scorer's kernels."""
    module = name if name in OFFERED_SCORERS else "by_torch"
    kernels: type[Scored] = import_module(f"vllm_l2kv.kernels.scores.{module}").Kernels
    return kernels
