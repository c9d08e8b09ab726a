"""The kernels of `l1`."""

import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import load_part
from vllm_l2kv.kernels.scores.simple import Simple


@triton.jit
def score(
    rows, o_row, num_rows, i_selection, i_order, extra, SHAPE: tl.constexpr,
    KEY: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """`-||k||_1`."""
    return -tl.sum(tl.abs(load_part(rows, o_row < num_rows, 0, KEY, KEY_PADDED)), axis=1)


class Kernels(Simple):
    """One pass over keys."""

    score = score
