"""The kernels of `value_key_ratio`."""

import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import key_norms, value_norms
from vllm_l2kv.kernels.scores.simple import Simple


@triton.jit
def score(
    rows, o_row, num_rows, i_selection, i_order, extra, SHAPE: tl.constexpr,
    KEY: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """`||v|| / ||k||`."""
    m_row = o_row < num_rows
    values = value_norms(rows, m_row, KEY, VALUE, VALUE_PADDED)
    return tl.div_rn(values, key_norms(rows, m_row, KEY, KEY_PADDED))


class Kernels(Simple):
    """One pass over keys and values."""

    score = score
