"""Ranks of a prompt's tokens by torch, for scorers and granularities that no kernel knows."""

import torch

from vllm_l2kv.kernels.group_cache import GroupCache
from vllm_l2kv.kernels.reference import LayerRows, ranked, read
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.scorers import Scorer
from vllm_l2kv.token_groups import pool_scores

TORCH_BYTES = 128 << 20
"""Memory that torch's scorers may take, if one head at a time fits it."""
TORCH_COPIES = 8
"""What they take at most, in copies of the keys in fp32."""


def torch_bytes_of_a_head(head_size: int, num_tokens: int) -> int:
    """Device memory that torch's scorers take for one head of one prompt."""
    return TORCH_COPIES * 4 * head_size * num_tokens


def write_ranks(
    out: torch.Tensor, cache: GroupCache, blocks: torch.Tensor, params: CompressionParams, scorer: Scorer
) -> None:
    """Ranks a prompt's tokens, as many heads at once as memory allows.

    The tokens of the lowest ranks are those that the reference selects by the highest scores.

    Args:
        out: `[num_layers, num_kv_heads, num_rows]` int32; the token kept first gets 1.
        cache: The group's caches.
        blocks: `[num_blocks]` integers, the prompt's block table.
        params: What the request asks.
        scorer: What they name, bound to the group.
    """
    num_kv_heads, n = out.shape[1:]
    order = torch.arange(1, n + 1, dtype=torch.int32, device=out.device)
    at_once = max(1, TORCH_BYTES // torch_bytes_of_a_head(cache.head_size, n))
    parts = [slice(head, head + at_once) for head in range(0, num_kv_heads, at_once)]
    for i_layer, (layer, ranks) in enumerate(zip(cache.layers, out, strict=True)):
        # A score is as long as a rank: scores wait in the ranks' place until all heads of the layer are scored.
        # Their means take less memory than a scorer does for one head, and are made after it gave that back.
        scores = ranks.view(torch.float32)
        for heads in parts:
            keys, values = layer[:, heads, :, : cache.head_size], layer[:, heads, :, cache.head_size :]
            rows = LayerRows(keys, values, cache.key_dtype)
            seen = rows.seen(read(keys, blocks, n), read(values, blocks, n), i_layer, heads.start)
            scores[heads] = scorer.score(seen)
        scores = pool_scores(scores, params.granularity)
        for heads in parts:
            kept = ranked(scores[heads], params.protect_first, params.protect_last)
            ranks[heads].scatter_(1, kept, order.expand(kept.shape))
