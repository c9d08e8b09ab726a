"""Attention of a layer with KV heads of both classes: once for each class, on a cache of its own.

To vLLM's memory such a layer is two: its own name holds the cache of the heads that compact, `full_name` that of the
others (`vllm_l2kv.kv_cache_spec`). The model calls it as ever. vLLM finds a layer's implementation of attention by the
layer's name while the model runs, so ours takes its place there. It deals queries, keys and values out to one copy of
vLLM's implementation for each class, which reads what vLLM has prepared for that class's cache.
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
"""Places of heads in a tensor's second dimension: a slice where they are in a row, since that needs no copy."""


class HeadClass:
    """The heads of a layer that are of one class.

    Args:
        name: vLLM's name of their cache.
        impl: vLLM's implementation for all heads of the layer.
        kv_heads: Places of their KV heads in the layer, ascending.
        device: Where the layer runs.

    Attributes:
        name: As the argument.
        kv_heads: As the argument.
        kv: The same, to take them from a tensor.
        queries: Places of their query heads, those of a KV head next to each other.
        impl: vLLM's implementation for that many heads; the rest of it is that of the layer.
    """

    def __init__(self, name: str, impl: Any, kv_heads: Sequence[int], device: torch.device) -> None:
        group = impl.num_heads // impl.num_kv_heads
        queries = [head * group + i for head in kv_heads for i in range(group)]
        self.name = name
        self.kv_heads = tuple(kv_heads)
        self.kv = _places(kv_heads, device)
        self.queries = _places(queries, device)
        self.impl = copy(impl)
        self.impl.num_heads, self.impl.num_kv_heads = len(queries), len(kv_heads)
        if impl.sinks is not None:
            self.impl.sinks = impl.sinks[queries]


class SplitAttention:
    """Takes the place of a layer's implementation of attention; what it does not answer, vLLM's answers.

    Args:
        impl: vLLM's, for all heads.
        classes: Of the layer's heads, that of its own name first.

    Attributes:
        classes: As the argument.
    """

    def __init__(self, impl: Any, classes: Sequence[HeadClass]) -> None:
        self._impl = impl
        self.classes = tuple(classes)
        self.num_heads, self.num_kv_heads = classes[0].impl.num_heads, classes[0].impl.num_kv_heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._impl, name)

    def get_impl_variants(self) -> tuple[Any, ...]:
        """Same contract as upstream: the copies."""
        return tuple(each.impl for each in self.classes)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Same contract as upstream; the last two are those of the layer's own name."""
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
        """Same contract as upstream; cache and metadata are those of the layer's own name."""
        if attn_metadata is None:  # vLLM measures memory
            whole: torch.Tensor = self._impl.forward(layer, query, key, value, kv_cache, attn_metadata, output)
            return whole
        for each in self.classes:
            metadata, _, cache, _ = get_attention_context(each.name)
            queries = _taken(query, each.queries)
            # Not into `output`: vLLM's kernel for CPUs writes rows next to each other, whatever the strides. Keys and
            # values are in the cache by now.
            of_class = output.new_empty(queries.shape[0], queries.shape[1], output.shape[2])
            each.impl.forward(layer, queries, None, None, cache, metadata, of_class)
            output[:, each.queries] = of_class
        return output


class FullHeads(AttentionLayerBase):
    """The full heads of a layer, as vLLM's memory sees them: a layer that no model calls.

    Args:
        layer: vLLM's.
        heads: The class.

    Attributes:
        impl: Says how many heads there are, to those that prepare attention.
        num_heads: Query heads.
        kv_cache: Theirs, once vLLM has made it.
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
        """None: the worker says it."""
        return None


def split_attention(
    layers: dict[str, Any], name: str, compressed: Sequence[int], full: Sequence[int], device: torch.device
) -> None:
    """Splits a layer's attention by class, before vLLM makes the caches.

    Args:
        layers: vLLM's, by name; one is added.
        name: The layer's.
        compressed: Places of the KV heads that compact, ascending.
        full: The others.
        device: Where it runs.
    """
    layer = layers[name]
    of_compressed = HeadClass(name, layer.impl, compressed, device)
    of_full = HeadClass(full_name(name), layer.impl, full, device)
    layers[of_full.name] = FullHeads(layer, of_full)
    layer.impl = SplitAttention(layer.impl, (of_compressed, of_full))


def check_split(name: str, layers: Mapping[str, Any]) -> None:
    """Refuses to split a layer whose heads cannot be separated.

    Args:
        name: The layer's.
        layers: vLLM's, by name.

    Raises:
        ValueError: Says why, and what to do.
    """
    layer = layers[name]
    sharing = [other for other, it in layers.items() if getattr(it, "kv_sharing_target_layer_name", None) == name]
    reasons = {
        f"layer {sharing[0] if sharing else ''} reads its cache": bool(sharing),
        "it has a scale of its own for each head's quantized keys or values": any(
            getattr(layer, scale).numel() > 1 for scale in ("_q_scale", "_k_scale", "_v_scale")
        ),
        "vLLM has several implementations for it": len(layer.impl.get_impl_variants()) > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"The KV heads of layer {name} must all be full or none, since {reason}; name all or none of them in "
                "--kv-full-heads."
            )


def _places(heads: Sequence[int], device: torch.device) -> Places:
    first, last = heads[0], heads[-1]
    if last - first + 1 == len(heads):
        return slice(first, last + 1)
    # On the device now: a CUDA graph cannot wait for the host.
    return torch.tensor(heads, device=device)


def _taken(states: torch.Tensor, heads: Places) -> torch.Tensor:
    """Heads of `[num_tokens, num_heads, head_size]`."""
    if isinstance(heads, slice):
        return states[:, heads]
    if states.itemsize == 1:  # not every device gathers fp8
        return states.view(torch.uint8).index_select(1, heads).view(states.dtype)
    return states.index_select(1, heads)
