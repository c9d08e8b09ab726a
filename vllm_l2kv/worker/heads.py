"""Attention of a mixed layer, which has full and compressed KV heads: one call for each class, each on its own cache.

vLLM's memory management sees two layers: the layer's own name has the cache of the compressed heads, `full_name` that
of the full heads (`vllm_l2kv.kv_cache_spec`). The model calls the layer as before. vLLM looks up a layer's attention
implementation by the layer's name while the model runs, so `SplitAttention` is put there. It passes the queries, keys
and values of each class to its own copy of vLLM's implementation, with the metadata that vLLM made for its cache.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_l2kv.kv_cache_spec import full_name

Places = slice | torch.Tensor
"""Indices of heads in a tensor's second dimension: a slice if they are consecutive, since that needs no copy."""


class HeadClass:
    """The heads of a layer that belong to one class.

    Args:
        name: vLLM's name of their cache.
        impl: vLLM's implementation for all heads of the layer.
        kv_heads: Indices of the class's KV heads in the layer, ascending.
        device: Device of the layer.

    Attributes:
        name: See the argument.
        kv_heads: See the argument.
        kv: `kv_heads` as an index into a tensor.
        queries: Indices of the class's query heads; those of one KV head are adjacent.
        impl: A copy of vLLM's implementation with the class's number of heads.
    """

    def __init__(self, name: str, impl: Any, kv_heads: Sequence[int], device: torch.device) -> None:
        group = impl.num_heads // impl.num_kv_heads
        queries = [head * group + i for head in kv_heads for i in range(group)]
        self.name = name
        self.kv_heads = tuple(kv_heads)
        self.kv = _places(kv_heads, device)
        self.queries = _places(queries, device)
        self.impl = with_heads(impl, len(kv_heads))
        if impl.sinks is not None:
            self.impl.sinks = impl.sinks[queries]


def with_heads(impl: Any, num_kv_heads: int) -> Any:
    """A copy of vLLM's implementation for so many of its KV heads, and their query heads."""
    part = copy(impl)
    part.num_heads, part.num_kv_heads = impl.num_heads // impl.num_kv_heads * num_kv_heads, num_kv_heads
    return part


class SplitAttention:
    """Wraps a layer's attention implementation and calls it by class of heads; other calls go to vLLM's.

    Args:
        impl: vLLM's implementation for all heads.
        classes: Classes of the layer's heads; the one with the cache of the layer's own name comes first.

    Attributes:
        classes: See the argument.
    """

    def __init__(self, impl: Any, classes: Sequence[HeadClass]) -> None:
        self._impl = impl
        self.classes = tuple(classes)
        self.num_heads, self.num_kv_heads = classes[0].impl.num_heads, classes[0].impl.num_kv_heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._impl, name)

    def get_impl_variants(self) -> tuple[Any, ...]:
        """Same contract as upstream: the implementations of both classes."""
        return tuple(each.impl for each in self.classes)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Same contract as upstream; `kv_cache` and `slot_mapping` are those of the layer's own name."""
        for each in self.classes:
            _, _, cache, slots = get_attention_context(each.name)
            each.impl.do_kv_cache_update(layer, _taken(key, each.kv), _taken(value, each.kv), cache, slots)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Same contract as upstream; `kv_cache` and `attn_metadata` are those of the layer's own name."""
        if attn_metadata is None:  # vLLM's memory profiling
            whole: torch.Tensor = self._impl.forward(layer, query, key, value, kv_cache, attn_metadata, output)
            return whole
        for each in self.classes:
            metadata, _, cache, _ = get_attention_context(each.name)
            queries = _taken(query, each.queries)
            # A new tensor, since vLLM's CPU kernel ignores strides and writes rows contiguously. Keys and values are
            # already in the cache.
            of_class = output.new_empty(queries.shape[0], queries.shape[1], output.shape[2])
            each.impl.forward(layer, queries, None, None, cache, metadata, of_class)
            output[:, each.queries] = of_class
        return output


class FullHeads(AttentionLayerBase):
    """The full heads of a mixed layer as a layer of vLLM that gets a cache, but that no model calls.

    Args:
        layer: vLLM's attention layer.
        heads: The class of full heads.

    Attributes:
        impl: The class's implementation, from which vLLM's metadata builders read the number of heads.
        num_heads: Number of query heads.
        kv_cache: The cache of the full heads, once vLLM has allocated it.
    """

    def __init__(self, layer: Any, heads: HeadClass) -> None:
        self._layer = layer
        self.impl = heads.impl
        self.num_heads = heads.impl.num_heads
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The layer's."""
        backend: type[AttentionBackend] = self._layer.get_attn_backend()
        return backend

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec | None:
        """None: the worker makes the spec of this cache."""
        return None


def split_attention(
    layers: dict[str, Any], name: str, compressed: Sequence[int], full: Sequence[int], device: torch.device
) -> None:
    """Splits a layer's attention by class, before vLLM allocates the caches.

    Args:
        layers: vLLM's layers by name; a layer for the full heads is added.
        name: Name of the layer.
        compressed: Indices of the compressed KV heads in the layer, ascending.
        full: Indices of the full KV heads, ascending.
        device: Device of the layer.
    """
    layer = layers[name]
    of_compressed = HeadClass(name, layer.impl, compressed, device)
    of_full = HeadClass(full_name(name), layer.impl, full, device)
    layers[of_full.name] = FullHeads(layer, of_full)
    layer.impl = SplitAttention(layer.impl, (of_compressed, of_full))


def check_split(name: str, layers: Mapping[str, Any]) -> None:
    """Rejects full heads in a layer whose heads cannot be separated.

    Args:
        name: Name of the layer.
        layers: vLLM's layers by name.

    Raises:
        ValueError: The layer cannot be split; the message says why, and what to do.
    """
    layer = layers[name]
    sharing = [other for other, it in layers.items() if getattr(it, "kv_sharing_target_layer_name", None) == name]
    reasons = {
        f"layer {sharing[0] if sharing else ''} reads its cache": bool(sharing),
        "its quantized keys or values have a separate scale for each head": any(
            getattr(layer, scale).numel() > 1 for scale in ("_q_scale", "_k_scale", "_v_scale")
        ),
        "vLLM has several implementations for it (--attention-backend TRITON_ATTN has one)": (
            len(layer.impl.get_impl_variants()) > 1
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"The KV heads of layer {name} must all be full or all be compressed, since {reason}; name all or none "
                "of them in --kv-full-heads, or take --kv-classes layers of a profile."
            )


def _places(heads: Sequence[int], device: torch.device) -> Places:
    first, last = heads[0], heads[-1]
    if last - first + 1 == len(heads):
        return slice(first, last + 1)
    # Copied to the device now, since a CUDA graph cannot wait for the host.
    return torch.tensor(heads, device=device)


def _taken(states: torch.Tensor, heads: Places) -> torch.Tensor:
    """The given heads of `[num_tokens, num_heads, head_size]`."""
    if isinstance(heads, slice):
        return states[:, heads]
    if states.itemsize == 1:  # not every device supports index_select of fp8
        return states.view(torch.uint8).index_select(1, heads).view(states.dtype)
    return states.index_select(1, heads)
