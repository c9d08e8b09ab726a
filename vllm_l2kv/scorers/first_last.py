"""The first four tokens and the last ones: a control that looks at no key.

Source: StreamingLLM, Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453,
without its moving of positions.
"""

import torch

from vllm_l2kv.scorers import Prompt

NUM_SINKS = 4


def score(prompt: Prompt) -> torch.Tensor:
    """The position, and more than any position for the sinks."""
    num_rows, num_tokens = prompt.keys.shape[:2]
    scores = torch.arange(num_tokens, dtype=torch.float32, device=prompt.keys.device)
    scores[:NUM_SINKS] = num_tokens
    return scores.expand(num_rows, -1)
