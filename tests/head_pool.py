"""A pool of two KV-cache groups whose layers hold heads of both classes, with requests in it."""

from dataclasses import dataclass

import torch

from vllm_l2kv.kernels.head_pages import HeadPages, Held

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, HEAD, VALUE = 4, 8, 16
FULL_HEADS = ([1], [0, 3], [0, 1, 2], [2])
"""Full heads of each layer; so their places in blocks differ between layers, and between the classes."""
SMALL, LARGE = 4, 12
LENGTHS = {"full": [1, 50, 0, 37], "compressed": [1, 9, 0, 24]}
"""Rows of four requests, including the one just written; the third request is padding."""


@dataclass
class Pool:
    """A pool of two KV-cache groups; full heads have the larger blocks."""

    dtype: torch.dtype = torch.float32
    full_size: int = LARGE
    compressed_size: int = SMALL
    padding: int = 0
    head_size: int = HEAD
    value_size: int = VALUE

    def __post_init__(self) -> None:
        self.num_blocks, content = 40, self.head_size + self.value_size
        num_full = sum(map(len, FULL_HEADS))
        sizes = (num_full * self.full_size, (HEADS * len(FULL_HEADS) - num_full) * self.compressed_size)
        self.stride = max(sizes) * content + self.padding
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(self.num_blocks * self.stride, generator=generator).to(self.dtype)
        self.memory = numbers.view(torch.uint8 if self.dtype.itemsize == 1 else self.dtype).to(DEVICE)
        ids = iter(torch.randperm(self.num_blocks - 1, generator=generator).add(1).tolist())
        self.tables = {}
        for name, size in (("full", self.full_size), ("compressed", self.compressed_size)):
            table = torch.zeros(len(LENGTHS[name]), 20, dtype=torch.int32)
            for request, length in enumerate(LENGTHS[name]):
                num_blocks = -(-length // size)
                table[request, :num_blocks] = torch.tensor([next(ids) for _ in range(num_blocks)], dtype=torch.int32)
            self.tables[name] = table.to(DEVICE)

    def cache(self, name: str, layer: int) -> torch.Tensor:
        counts = [len(heads) if name == "full" else HEADS - len(heads) for heads in FULL_HEADS]
        size, content = self.full_size if name == "full" else self.compressed_size, self.head_size + self.value_size
        return torch.as_strided(
            self.memory,
            (self.num_blocks, counts[layer], size, content),
            (self.stride, size * content, content, 1),
            sum(counts[:layer]) * size * content,
        )

    def held(self, name: str) -> Held:
        size = self.full_size if name == "full" else self.compressed_size
        lengths = torch.tensor(LENGTHS[name], dtype=torch.int32, device=DEVICE)
        last = (lengths - 1).long()
        blocks = self.tables[name].gather(1, (last // size).clamp_min(0).unsqueeze(1)).squeeze(1)
        slots = torch.where(lengths > 0, blocks.long() * size + last % size, -1)
        return Held(self.tables[name], lengths, slots)

    def rows(self, name: str, layer: int, head: int, request: int) -> torch.Tensor:
        """Returns the rows of one request in one head of a class: `[length, content]`."""
        cache, length = self.cache(name, layer), LENGTHS[name][request]
        return cache[self.tables[name][request].long(), head].flatten(0, 1)[:length]


def pages_of(pool: Pool, layer: int) -> HeadPages | None:
    full_heads = FULL_HEADS[layer]
    return HeadPages.of(
        pool.cache("full", layer),
        pool.cache("compressed", layer),
        full_heads,
        [head for head in range(HEADS) if head not in full_heads],
    )
