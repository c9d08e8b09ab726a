"""Chance: a control. Scores are the same in every run and differ between layers and heads.

Source: "keep random" in Devoto et al., arXiv 2406.11430, section 3. The numbers are those of SplitMix64 (Steele, Lea,
Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), which needs no state and so no seed but `SEED`.
"""

import torch

from vllm_l2kv.scorers import Prompt

SEED = 0


def score(prompt: Prompt) -> torch.Tensor:
    """Uniform in [0, 1), 24 bits."""
    positions = torch.arange(prompt.keys.shape[1], device=prompt.keys.device)
    bits = _mixed((prompt.row_ids[:, None] << 32) + positions + SEED)
    return (bits & 0xFFFFFF).float() / 2**24


def _mixed(counters: torch.Tensor) -> torch.Tensor:
    """SplitMix64 of int64 counters; multiplication wraps, shifts bring in zeros."""
    bits = counters * -0x61C8864680B583EB
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return bits ^ ((bits >> 31) & (2**33 - 1))
