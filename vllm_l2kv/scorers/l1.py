"""Low key norms in L1: as `l2`, by the sum of a key's magnitudes.

Source: the L1 norm in place of the L2 norm of Devoto et al., arXiv 2406.11430, section 2.
"""

import torch

from vllm_l2kv.scorers import Prompt, norms


def score(prompt: Prompt) -> torch.Tensor:
    """`-||k||_1`."""
    return -norms(prompt.keys, 1)
