"""The kernels of `keydiff_value`: scores of `keydiff`, norms of values, then the sum of both ranks."""

import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import Batch, value_norms
from vllm_l2kv.kernels.one_pass import one_pass
from vllm_l2kv.kernels.ranks import add_ranks, selections_at_once
from vllm_l2kv.kernels.scores import keydiff
from vllm_l2kv.scorers import Scorer


@triton.jit
def score_values(
    rows, o_row, num_rows, i_selection, i_order, extra, SHAPE: tl.constexpr,
    KEY: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """`||v||`."""
    return value_norms(rows, o_row < num_rows, KEY, VALUE, VALUE_PADDED)


class Kernels:
    """Ranks as many layers and heads at a time as fit in the work memory."""

    def __init__(self, scorer: Scorer) -> None:
        self._keydiff = keydiff.Kernels(scorer)

    def write(self, batch: Batch, out: torch.Tensor, work: torch.Tensor, raw: bool) -> None:
        """See `scores.Scored`."""
        self._keydiff.write(batch, out, work, raw=True)
        for selections in selections_at_once(batch, work):
            one_pass(score_values, batch, work, raw=True, selections=selections)
            add_ranks(batch, out, work, selections, raw)
