"""What eviction by norm costs, in attention: formulas on one layer's norms and attention maps.

The setting is that of the authors' `compare_norm_and_attention` (https://github.com/alessiodevoto/l2compress): a prompt
is evicted from once, at its end, and queries behind it are watched. Their own keys and those of each other are no
candidates, as tokens generated after a compaction are none.

Shapes: H KV heads, Q queries, n prompt tokens. All tensors are fp32.
"""

from collections.abc import Sequence

import torch

from vllm_l2kv.kernels.reference import ranked
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import num_keep


def per_kv_head(attention: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Mean over the query heads that share a KV head: `[num_heads, Q, n]` to `[H, Q, n]`."""
    return attention.view(num_kv_heads, -1, *attention.shape[1:]).mean(1)


def variation(norms: torch.Tensor) -> torch.Tensor:
    """Coefficient of variation, standard deviation over mean, of norms `[H, n]`: `[H]`."""
    return norms.std(-1, correction=0) / norms.mean(-1)


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation along the last axis of `[H, n]` and `[H, n]`: `[H]`, 0 where one is constant."""
    x, y = (each - each.mean(-1, keepdim=True) for each in (_ranks(x), _ranks(y)))
    spread = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    correlation: torch.Tensor = ((x * y).sum(-1) / spread).nan_to_num()
    return correlation


def _ranks(x: torch.Tensor) -> torch.Tensor:
    """Ranks along the last axis of `[H, n]`, from 0, fp64; equal values share the mean of theirs."""
    ordered = x.contiguous().sort(-1).values
    below, upto = (torch.searchsorted(ordered, x.contiguous(), side=side) for side in ("left", "right"))
    return (below + upto - 1).double() / 2


def dropped_attention(norms: torch.Tensor, attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the m dropped tokens, for m = 1..n (Devoto et al., arXiv 2406.11430, equations 1 and 2).

    Args:
        norms: `[H, n]`.
        attention: `[H, Q, n]` of each query to the prompt's tokens; does not sum to 1, as queries also see themselves
            and each other. Neither the authors nor we renormalise it here.

    Returns:
        `L^m`, dropping by the server's own rule, and `L^{m,ref}`, dropping what each query looks at least: the lowest
        possible, and different tokens for each query. Both `[H, Q, n]`.
    """
    # The order in which tokens are kept, from its end.
    order = ranked(-norms).flip(-1).unsqueeze(1).expand_as(attention)
    return attention.gather(-1, order).cumsum(-1), attention.sort(-1).values.cumsum(-1)


def attention_loss_reference(norms: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """The paper's ALR (equation 3), the mean over queries where the paper has one.

    Args:
        norms: As those of `dropped_attention`.
        attention: The same.

    Returns:
        `[H]`, `sum over m of L^m - L^{m,ref}`: 0 where norms rank tokens as attention does, at most n.
    """
    by_norm, ideal = dropped_attention(norms, attention)
    return (by_norm - ideal).sum(-1).mean(-1)


def attention_loss(
    norms: torch.Tensor, attention: torch.Tensor, keep_ratios: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of the attention to the prompt that goes to evicted tokens. A random eviction loses `1 - keep_ratio`.

    Args:
        norms: As those of `dropped_attention`.
        attention: The same; here the shares are of all that the queries together pay to the prompt.
        keep_ratios: R ratios in (0, 1].

    Returns:
        Losses by norm and ideal ones, `[R, H]` in [0, 1].
    """
    n = norms.shape[-1]
    # Unprotected, as in the paper: the question is what norms alone would evict.
    params = [CompressionParams(ratio, protect_first=0, protect_last=0) for ratio in keep_ratios]
    num_dropped = [n - num_keep(n, each) for each in params]
    total = attention.sum(dim=(1, 2))

    def shares(dropped: torch.Tensor) -> torch.Tensor:
        from_none = torch.nn.functional.pad(dropped.sum(1), (1, 0))
        # A head that looks past the whole prompt, 0 / 0, loses nothing.
        return (from_none[:, num_dropped] / total[:, None]).nan_to_num().T

    by_norm, ideal = dropped_attention(norms, attention)
    return shares(by_norm), shares(ideal)
