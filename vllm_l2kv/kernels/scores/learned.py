"""The kernel of `learned`: features of a tile and its head's network in one pass, with products on tensor cores."""

import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import Batch, load_elements
from vllm_l2kv.kernels.one_pass import one_pass
from vllm_l2kv.scorers import learned

ROWS = 64
"""Rows per tile: many, since each tile reads all weights of its head."""
CHUNK = tl.constexpr(64)
"""Features that are multiplied at a time."""
HIDDEN, LOWEST_NORM = tl.constexpr(learned.HIDDEN), tl.constexpr(learned.LOWEST_NORM)


@triton.jit
def score(
    rows, o_row, num_rows, i_selection, i_order, extra, SHAPE: tl.constexpr,
    KEY: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """`w2 . gelu(x w1 + b1) + wl . x + b`, where `x` are the features of `scorers.learned.features`."""
    PAIRS: tl.constexpr = SHAPE[0]
    SECOND: tl.constexpr = SHAPE[1]  # offset of the second element of the first pair
    STEP: tl.constexpr = SHAPE[2]  # elements from one pair to the next
    SLOW: tl.constexpr = SHAPE[3]  # number of slow pairs
    OTHERS: tl.constexpr = KEY - 2 * PAIRS
    ELEMENTS: tl.constexpr = PAIRS + 2 * SLOW  # index of the first feature that is an element outside of pairs
    FEATURES: tl.constexpr = ELEMENTS + OTHERS + VALUE + 2
    w1, b1, w2, wl, b = extra
    i_selection = i_selection.to(tl.int64)
    w1 += i_selection * FEATURES * HIDDEN
    wl += i_selection * FEATURES
    o_hidden = i_selection * HIDDEN + tl.arange(0, HIDDEN)
    m_row = o_row < num_rows

    b_hidden = tl.zeros([o_row.shape[0], HIDDEN], tl.float32) + tl.load(b1 + o_hidden)[None, :]
    b_score = tl.zeros([o_row.shape[0]], tl.float32) + tl.load(b + i_selection)
    b_key = tl.zeros([o_row.shape[0]], tl.float32)
    b_value = tl.zeros([o_row.shape[0]], tl.float32)
    for start in range(0, PAIRS, CHUNK):
        o_pair = start + tl.arange(0, CHUNK)
        b_first = load_elements(rows, m_row, o_pair * STEP, o_pair < PAIRS)
        b_second = load_elements(rows, m_row, SECOND + o_pair * STEP, o_pair < PAIRS)
        b_squares = b_first * b_first + b_second * b_second
        b_key += tl.sum(b_squares, axis=1)
        b_hidden, b_score = _add(b_hidden, b_score, tl.sqrt_rn(b_squares), w1, wl, o_pair, o_pair < PAIRS)
        if SLOW > 0:
            # Slow pairs are those from PAIRS - SLOW on; all their first elements come before all second ones.
            m_slow = (o_pair >= PAIRS - SLOW) & (o_pair < PAIRS)
            b_hidden, b_score = _add(b_hidden, b_score, b_first, w1, wl, o_pair + SLOW, m_slow)
            b_hidden, b_score = _add(b_hidden, b_score, b_second, w1, wl, o_pair + 2 * SLOW, m_slow)
    for start in range(0, OTHERS, CHUNK):
        o_other = start + tl.arange(0, CHUNK)
        b_x = load_elements(rows, m_row, 2 * PAIRS + o_other, o_other < OTHERS)
        b_key += tl.sum(b_x * b_x, axis=1)
        b_hidden, b_score = _add(b_hidden, b_score, b_x, w1, wl, ELEMENTS + o_other, o_other < OTHERS)
    for start in range(0, VALUE, CHUNK):
        o_element = start + tl.arange(0, CHUNK)
        b_x = load_elements(rows, m_row, KEY + o_element, o_element < VALUE)
        b_value += tl.sum(b_x * b_x, axis=1)
        b_hidden, b_score = _add(b_hidden, b_score, b_x, w1, wl, ELEMENTS + OTHERS + o_element, o_element < VALUE)
    b_hidden, b_score = _add_logarithm(b_hidden, b_score, b_key, w1, wl, FEATURES - 2)
    b_hidden, b_score = _add_logarithm(b_hidden, b_score, b_value, w1, wl, FEATURES - 1)
    return b_score + tl.sum(_gelu(b_hidden) * tl.load(w2 + o_hidden)[None, :], axis=1)


@triton.jit
def _add(b_hidden, b_score, b_x, w1, wl, o_feature, m_feature):
    """Adds the contribution of some features."""
    b_x = b_x.to(tl.bfloat16)
    o_weight = o_feature[:, None] * HIDDEN + tl.arange(0, HIDDEN)[None, :]
    b_hidden = tl.dot(b_x, tl.load(w1 + o_weight, mask=m_feature[:, None], other=0.0), b_hidden)
    b_linear = tl.load(wl + o_feature, mask=m_feature, other=0.0).to(tl.float32)
    return b_hidden, b_score + tl.sum(b_x.to(tl.float32) * b_linear[None, :], axis=1)


@triton.jit
def _add_logarithm(b_hidden, b_score, b_squares, w1, wl, FEATURE: tl.constexpr):
    """Adds the contribution of the logarithm of a norm, given the norm's square."""
    b_x = tl.log(tl.maximum(tl.sqrt_rn(b_squares), LOWEST_NORM)).to(tl.bfloat16).to(tl.float32)
    b_weight = tl.load(w1 + FEATURE * HIDDEN + tl.arange(0, HIDDEN)).to(tl.float32)
    return b_hidden + b_x[:, None] * b_weight[None, :], b_score + b_x * tl.load(wl + FEATURE).to(tl.float32)


@triton.jit
def _gelu(x):
    """`x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`, by the sigmoid of twice the argument."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


class Kernels:
    """One pass over keys and values."""

    def __init__(self, scorer: learned.Bound) -> None:
        self._weights = scorer.w1, scorer.b1, scorer.w2, scorer.wl, scorer.b
        self._rope = scorer.rope

    def write(self, batch: Batch, out: torch.Tensor, work: torch.Tensor, raw: bool) -> None:
        """See `scores.Scored`."""
        pairs = self._rope.rotary_dim // 2
        second, step = (1, 2) if self._rope.interleaved else (pairs, 1)
        shape = pairs, second, step, self._rope.slow_pairs
        one_pass(score, batch, out, raw=raw, extra=self._weights, shape=shape, rows=ROWS, num_warps=4)
