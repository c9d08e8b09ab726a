"""How much attention eviction by norm loses: formulas on one layer's norms and attention.

The setting is that of the authors' `compare_norm_and_attention` (https://github.com/alessiodevoto/l2compress): rows of
a prompt are evicted once, at its end, and the attention of later queries is measured. The keys of these later tokens
are not candidates for eviction, like those of tokens generated after a compaction.

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
    """Ranks along the last axis of `[H, n]`, from 0, fp64; equal values get the mean of their ranks."""
    ordered = x.contiguous().sort(-1).values
    below, upto = (torch.searchsorted(ordered, x.contiguous(), side=side) for side in ("left", "right"))
    return (below + upto - 1).double() / 2


def evicted_attention(norms: torch.Tensor, attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the m evicted tokens, for m = 1..n (Devoto et al., arXiv 2406.11430, equations 1 and 2).

    Args:
        norms: `[H, n]`.
        attention: `[H, Q, n]` of each query to the prompt's tokens. It does not sum to 1, since queries also attend to
            themselves and each other; as in the authors' code, it is not renormalized.

    Returns:
        `L^m`, if tokens are evicted as by the server, and `L^{m,ref}`, if for each query the tokens with the lowest
        attention are evicted: the lowest possible loss. Both `[H, Q, n]`.
    """
    # The order in which tokens are kept, reversed.
    order = ranked(-norms).flip(-1).unsqueeze(1).expand_as(attention)
    return attention.gather(-1, order).cumsum(-1), attention.sort(-1).values.cumsum(-1)


def attention_loss_reference(norms: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """The paper's ALR (equation 3), averaged over queries; the paper has a single query.

    Args:
        norms: See `evicted_attention`.
        attention: See `evicted_attention`.

    Returns:
        `[H]`, `sum over m of L^m - L^{m,ref}`: 0 if norms rank tokens as attention does, at most n.
    """
    by_norm, ideal = evicted_attention(norms, attention)
    return (by_norm - ideal).sum(-1).mean(-1)


def attention_loss(
    norms: torch.Tensor, attention: torch.Tensor, keep_ratios: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of the attention to the prompt that goes to evicted tokens. Random eviction loses `1 - keep_ratio`.

    Args:
        norms: See `evicted_attention`.
        attention: See `evicted_attention`; shares are of the attention of all queries together to the prompt.
        keep_ratios: R ratios in (0, 1].

    Returns:
        Loss of eviction by norm, and the lowest possible loss, each `[R, H]` in [0, 1].
    """
    n = norms.shape[-1]
    # Without protected tokens, as in the paper: this measures norms alone.
    params = [CompressionParams(ratio, protect_first=0, protect_last=0) for ratio in keep_ratios]
    num_evicted = [n - num_keep(n, each) for each in params]
    total = attention.sum(dim=(1, 2))

    def shares(evicted: torch.Tensor) -> torch.Tensor:
        from_none = torch.nn.functional.pad(evicted.sum(1), (1, 0))
        # A head without attention to the prompt (0 / 0) loses nothing.
        return (from_none[:, num_evicted] / total[:, None]).nan_to_num().T

    by_norm, ideal = evicted_attention(norms, attention)
    return shares(by_norm), shares(ideal)
