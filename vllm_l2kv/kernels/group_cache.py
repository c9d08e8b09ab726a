"""The caches of a group's compressed heads, as kernels on a GPU address them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True)
class GroupCache:
    """The caches of a group's compressed heads, which differ only in their address. Layers may differ in heads.

    Attributes:
        heads: One view for each head, `[num_blocks, block_size, content]`, layer by layer; a row is contiguous and
            holds the key, then the value.
        head_size: Elements of a key.
        key_dtype: Type of a key's elements; the tensor of a quantized cache has bytes instead.
        pointers: `[num_heads]` int64, addresses of the views.
        of_layers: `[num_layers + 1]` int32, index of each layer's first head, then the number of heads.
    """

    heads: tuple[torch.Tensor, ...]
    head_size: int
    key_dtype: torch.dtype
    pointers: torch.Tensor
    of_layers: torch.Tensor

    @classmethod
    def of(cls, layers: Sequence[torch.Tensor], head_size: int, key_dtype: torch.dtype | None = None) -> "GroupCache":
        """The heads of these layers.

        Args:
            layers: One view for each layer, `[num_blocks, num_kv_heads, block_size, content]`.
            head_size: See the attribute.
            key_dtype: See the attribute; `None` for the tensors' own type.

        Raises:
            ValueError: Shapes, strides or types of heads differ, or rows are not contiguous.
        """
        heads = tuple(head for layer in layers for head in layer.unbind(1))
        first = heads[0]
        for head in heads:
            if (head.shape, head.stride(), head.dtype) != (first.shape, first.stride(), first.dtype):
                raise ValueError("heads of a KV-cache group differ in shape, strides or type")
        if first.stride(2) != 1:
            raise ValueError("rows of the KV cache are not contiguous")
        ends = [*accumulate((layer.shape[1] for layer in layers), initial=0)]
        pointers = torch.tensor([head.data_ptr() for head in heads], dtype=torch.int64, device=first.device)
        of_layers = torch.tensor(ends, dtype=torch.int32, device=first.device)
        return cls(heads, head_size, key_dtype or first.dtype, pointers, of_layers)

    @property
    def num_selections(self) -> int:
        """Heads of all layers together: the number of selections of one order."""
        return len(self.heads)

    @property
    def block_size(self) -> int:
        """Rows of a block."""
        return self.heads[0].shape[1]

    @property
    def strides(self) -> tuple[int, int]:
        """Elements from one block to the next, and from one row to the next."""
        block, row, _ = self.heads[0].stride()
        return block, row

    @property
    def content(self) -> int:
        """Elements of a row."""
        return self.heads[0].shape[2]

    @property
    def value_size(self) -> int:
        """Elements of a value."""
        return self.content - self.head_size

    @property
    def like(self) -> torch.Tensor:
        """A tensor with the type of keys and values."""
        return self.heads[0].view(self.key_dtype)
