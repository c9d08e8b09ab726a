"""Large values with small keys.

Source: Chitty-Venkata et al., "PagedEviction: Structured Block-wise KV Cache Pruning for Efficient Large Language Model
Inference", arXiv 2509.04377, section 3, for each head instead of the mean over heads and layers.
"""

import torch

from vllm_l2kv.scorers import Prompt, norms


def score(prompt: Prompt) -> torch.Tensor:
    """`||v|| / ||k||`."""
    return norms(prompt.values) / norms(prompt.keys)
