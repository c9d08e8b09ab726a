"""The kernels of `l2_high`."""

import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import key_norms
from vllm_l2kv.kernels.scores.simple import Simple


@triton.jit
def score(
    rows, o_row, num_rows, i_selection, i_order, extra, SHAPE: tl.constexpr,
    KEY: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """`||k||`."""
    return key_norms(rows, o_row < num_rows, KEY, KEY_PADDED)


class Kernels(Simple):
    """One pass over keys."""

    score = score
