"""Sends whole blocks between the two engines of a prefill/decode pair.

vLLM's connector sends a block layer by layer. Groups share the bytes of a block, so layers of two groups may begin at
one address. There vLLM sends as many bytes for both as the first of them has, and the rest of a longer one is lost
without an error: all rows but the first of a full layer that comes after a compressed one.
"""

from collections.abc import Mapping

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector as LayerByLayer


class NixlConnector(LayerByLayer):
    """vLLM's connector under its own name, by which vLLM asks for it, with one region for all layers."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Same contract as upstream; blocks that hold several layers are sent as a whole."""
        super().register_kv_caches(whole_blocks(kv_caches))


def whole_blocks(caches: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views of whole blocks, `[num_blocks, num_bytes]`, for layers that share them; else the caches themselves.

    Args:
        caches: Caches of layers, `[num_blocks, num_heads, ...]`.
    """
    first = next(iter(caches.values()))
    storage, shape = first.untyped_storage(), (len(first), first.stride(0) * first.element_size())
    alike = {(cache.untyped_storage().data_ptr(), len(cache), cache.stride(0)) for cache in caches.values()}
    if len(alike) > 1 or storage.nbytes() != shape[0] * shape[1]:
        return dict(caches)
    blocks = torch.empty(0, dtype=torch.int8, device=first.device).set_(storage).view(shape)
    return dict.fromkeys(caches, blocks)
