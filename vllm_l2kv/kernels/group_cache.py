"""The caches of a group's compressed layers, as kernels on a GPU address them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GroupCache:
    """The caches of a group's compressed layers, which differ only in their address.

    Attributes:
        layers: One view a layer, `[num_blocks, num_kv_heads, block_size, content]`; a row is contiguous and holds
            the key, then the value.
        head_size: Elements of a key.
        key_dtype: What the elements of a key are; a quantized cache is a tensor of bytes.
        pointers: `[num_layers]` int64, addresses of the views.
    """

    layers: tuple[torch.Tensor, ...]
    head_size: int
    key_dtype: torch.dtype
    pointers: torch.Tensor

    @classmethod
    def of(cls, layers: Sequence[torch.Tensor], head_size: int, key_dtype: torch.dtype | None = None) -> "GroupCache":
        """Checks that the layers are alike.

        Args:
            layers: As the attribute.
            head_size: As the attribute.
            key_dtype: As the attribute; `None` for the tensors' own type.

        Raises:
            ValueError: Shapes, strides or types differ, or rows are not contiguous.
        """
        first = layers[0]
        for layer in layers:
            if (layer.shape, layer.stride(), layer.dtype) != (first.shape, first.stride(), first.dtype):
                raise ValueError("layers of a KV-cache group differ in shape, strides or type")
        if first.stride(3) != 1:
            raise ValueError("rows of the KV cache are not contiguous")
        pointers = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.int64, device=first.device)
        return cls(tuple(layers), head_size, key_dtype or first.dtype, pointers)

    @property
    def num_selections(self) -> int:
        """Layers times heads: what one order selects from, each by itself."""
        return len(self.layers) * self.layers[0].shape[1]

    @property
    def value_size(self) -> int:
        """Elements of a value."""
        return self.layers[0].shape[3] - self.head_size

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the keys' and values' type."""
        return self.layers[0].view(self.key_dtype)
