"""Keeps random rows: a control. Scores are the same in every run and differ between layers and heads.

Source: "keep random" in Devoto et al., arXiv 2406.11430, section 3. The numbers come from SplitMix64 (Steele, Lea,
Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), which has no state, with the constant `SEED`.
"""

import torch

from vllm_l2kv.scorers import Rows, Scorer

SEED = 0


class Bound(Scorer):
    """Uniform in [0, 1), 24 bits."""

    def score(self, rows: Rows) -> torch.Tensor:
        num_heads, num_rows = rows.keys.shape[:2]
        own = self.heads.numbers(rows.layer)[rows.first_head :][:num_heads]
        numbers = torch.tensor(own, device=rows.keys.device)
        bits = _mixed((numbers[:, None] << 32) + torch.arange(num_rows, device=rows.keys.device) + SEED)
        return (bits & 0xFFFFFF).float() / 2**24


def _mixed(counters: torch.Tensor) -> torch.Tensor:
    """SplitMix64 of int64 counters: multiplication wraps around, and right shifts are logical."""
    bits = counters * -0x61C8864680B583EB
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return bits ^ ((bits >> 31) & (2**33 - 1))
