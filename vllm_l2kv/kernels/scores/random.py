"""The kernels of `random`."""

import torch
import triton
import triton.language as tl

from vllm_l2kv.kernels.batch import Batch
from vllm_l2kv.kernels.one_pass import one_pass
from vllm_l2kv.scorers import Scorer
from vllm_l2kv.scorers.random import SEED as SEED_OF_SCORER

SEED = tl.constexpr(SEED_OF_SCORER)


@triton.jit
def score(
    rows, o_row, num_rows, i_selection, i_order, extra, SHAPE: tl.constexpr,
    KEY: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """SplitMix64 of the head's index and the row's index: 24 bits, in [0, 1)."""
    (numbers,) = extra
    bits = (tl.load(numbers + i_selection) << 32) + o_row + SEED
    bits = bits * -0x61C8864680B583EB
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    bits = bits ^ ((bits >> 31) & (2**33 - 1))
    return (bits & 0xFFFFFF).to(tl.float32) * 2.0**-24


class Kernels:
    """One pass that uses only the rows' indices."""

    def __init__(self, scorer: Scorer) -> None:
        heads = scorer.heads
        numbers = [number for layer in range(len(heads.layers)) for number in heads.numbers(layer)]
        self._numbers = torch.tensor(numbers, dtype=torch.int64, device=heads.device)

    def write(self, batch: Batch, out: torch.Tensor, work: torch.Tensor, raw: bool) -> None:
        """See `scores.Scored`."""
        one_pass(score, batch, out, raw=raw, extra=(self._numbers,))
