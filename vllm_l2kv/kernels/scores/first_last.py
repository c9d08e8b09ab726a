"""The kernels of `first_last`."""

import triton
import triton.language as tl

from vllm_l2kv.kernels.scores.simple import Simple
from vllm_l2kv.scorers.first_last import NUM_SINKS

SINKS = tl.constexpr(NUM_SINKS)


@triton.jit
def score(
    rows, o_row, num_rows, i_selection, i_order, extra, SHAPE: tl.constexpr,
    KEY: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """The row's index; for the sinks, more than any index."""
    return tl.where(o_row < SINKS, num_rows, o_row).to(tl.float32)


class Kernels(Simple):
    """One pass that uses only the rows' indices."""

    score = score
