"""Scores of cached keys: the higher, the sooner a token is kept.

A scorer sees one layer's keys as they lie in the cache (after RoPE, QK-norm and bias) and nothing else.
"""

import torch


def l2(keys: torch.Tensor) -> torch.Tensor:
    """Minus the L2 norm of each key: low-norm keys tend to attract attention later.

    In fp32 whatever the cache's type: in bf16 three quarters of the norms tie.

    Args:
        keys: `[..., num_tokens, head_size]`, any floating type. A factor common to all (the scale of an fp8 cache)
            leaves their order alone.

    Returns:
        `[..., num_tokens]`, fp32.

    Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    arXiv 2406.11430, section 2.
    """
    norms: torch.Tensor = torch.linalg.vector_norm(keys.float(), dim=-1)
    return -norms
