"""High key norms: a control, the opposite of `l2`.

Source: "keep high norm" in Devoto et al., arXiv 2406.11430, section 3.
"""

import torch

from vllm_l2kv.scorers import Prompt, norms


def score(prompt: Prompt) -> torch.Tensor:
    """`||k||`."""
    return norms(prompt.keys)
