"""Scores of cached tokens, one scorer a file: the higher a score, the sooner a token is kept.

A scorer sees what lies in the cache (keys after RoPE, QK-norm and bias) and nothing else. It works in fp32 whatever the
cache's type: in bf16 three quarters of the norms tie. Every row, a KV head of a layer, is scored by itself, so how many
are scored at once changes nothing. A factor common to a layer (the scale of an fp8 cache) is left out.
"""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch


class Prompt(NamedTuple):
    """The rows of one prompt.

    Attributes:
        keys: `[num_rows, num_tokens, head_size]`, any floating type.
        values: `[num_rows, num_tokens, head_size_v]`, the same.
        row_ids: `[num_rows]` int64, a number for each layer and head, the same in every run.
    """

    keys: torch.Tensor
    values: torch.Tensor
    row_ids: torch.Tensor


Scorer = Callable[[Prompt], torch.Tensor]
"""Takes a prompt, returns `[num_rows, num_tokens]` fp32."""


def scorer_of(name: str) -> Scorer:
    """The scorer that a request's `kv_scorer` names, one of `vllm_l2kv.params.SCORERS`."""
    scorer: Scorer = import_module(f"vllm_l2kv.scorers.{name}").score
    return scorer


def norms(rows: torch.Tensor, order: float = 2) -> torch.Tensor:
    """Norms of `[..., size]` in fp32: `[...]`; L2 unless another order is given."""
    lengths: torch.Tensor = torch.linalg.vector_norm(rows.float(), order, dim=-1)
    return lengths
