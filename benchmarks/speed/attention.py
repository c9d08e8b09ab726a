"""Time of decode attention alone for several layouts of the KV blocks in memory, mainly their stride.

python -m benchmarks.speed.attention --out attention.jsonl [--shapes 8b 1b ...] [--loads 8x15000 100x700 ...]

Eight requests of 15,000 tokens unless other loads are named, FlashAttention 3 as vLLM calls it in a full CUDA graph.
Block tables are shuffled, as in a server that has been running, or with `--fresh` in order, as after a start. The
layers of a pool are read in turn, as in a decode step, so no read hits the L2 cache.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.speed.rows import append, where
from vllm_l2kv.kv_cache_spec import FLASH_ATTENTION, pack

REPEATS = 7
KIB = 2**10


@dataclass(frozen=True)
class Shape:
    """Attention of one rank, with `num_layers` layers, of which the first two are full."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's K‖V in one layer."""
        return 2 * self.num_kv_heads * self.head_size * self.dtype.itemsize


SHAPES = {
    "8b": Shape(32, 32, 8, 128),
    "8b-fp8": Shape(32, 32, 8, 128, torch.float8_e4m3fn),
    "8b-tp4": Shape(32, 8, 2, 128),
    "1b": Shape(16, 32, 8, 64),
    "70b-8-layers": Shape(8, 64, 8, 128),
    "135m": Shape(30, 9, 3, 64),
}


class Load(NamedTuple):
    """Decoding requests of one length, in blocks that are in order or shuffled."""

    num_requests: int
    num_tokens: int
    is_fresh: bool = False

    @classmethod
    def parse(cls, word: str) -> "Load":
        """Returns the load that `REQUESTSxTOKENS` names."""
        num_requests, num_tokens = map(int, word.split("x"))
        return cls(num_requests, num_tokens)


@dataclass(frozen=True)
class Place:
    """Layout in memory of one class of layers.

    Attributes:
        what: `stock`; `compressed` or `full` as the plugin places them; `joined` for longer blocks; `scan` for others.
        layout: vLLM's name; with `L...` each layer is contiguous.
        num_layers: Layers in the pool.
        block_size: Tokens in a block.
        stride: Bytes between blocks of one layer.
    """

    what: str
    layout: str
    num_layers: int
    block_size: int
    stride: int


def main() -> None:
    """Measures every layout of every shape, at every load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--loads", nargs="+", type=Load.parse, default=[Load(8, 15_000)])
    parser.add_argument("--fresh", action="store_true", help="blocks in order, not shuffled")
    parser.add_argument("--only", nargs="+", help="layouts to measure, by their names in the rows")
    args = parser.parse_args()
    pool = torch.empty(60 * 2**30 // 2, dtype=torch.bfloat16, device="cuda").normal_()
    for name, load in product(args.shapes, args.loads):
        stock_us = None
        for place in places(SHAPES[name]):
            if args.only and place.what not in args.only:
                continue
            us = median_us_per_layer(SHAPES[name], place, load._replace(is_fresh=args.fresh), pool.view(torch.uint8))
            stock_us = stock_us or us
            row = {
                **where(),
                "shape": name,
                "load": f"{load.num_requests}x{load.num_tokens}",
                "fresh": args.fresh,
                **vars(place),
                "padding": round(1 - place.num_layers * place.block_size * SHAPES[name].token_bytes / place.stride, 4)
                if place.layout.startswith("B")
                else 0.0,
                "us_per_layer": round(us, 1),
                "ratio": round(us / stock_us, 3),
            }
            append(args.out, row)


def places(shape: Shape) -> Iterator[Place]:
    """Yields stock vLLM's layout, then those that the plugin chooses, then a scan of strides."""
    page = 16 * shape.token_bytes
    num_layers = shape.num_layers - 2
    yield Place("stock", "LBNHC", shape.num_layers, 16, page)
    yield Place("scan", "LBHNC", shape.num_layers, 16, page)
    yield from chosen(shape)
    for factor in (1, 2, 4, 8):
        stride = FLASH_ATTENTION.padded(num_layers * page * factor)
        yield Place("joined", "BLHNC", num_layers, 16 * factor, stride)
    for factor in (1, 2, 4, 8):
        for layout in ("BLHNC", "BLNHC"):
            yield Place("scan", layout, num_layers, 16 * factor, num_layers * page * factor)
    for padding in (4, 8, 16, 32, 48, 64, 96, 128):
        yield Place("scan", "BLHNC", num_layers, 16, num_layers * page + padding * KIB)
    # Only the stride matters, not what lies between the blocks, so any number of pages will do.
    for num_pages in range(max(num_layers - 6, 1), num_layers + 20):
        yield Place("scan", "BLHNC", num_pages, 16, num_pages * page)


def chosen(shape: Shape) -> Iterator[Place]:
    """Yields the layouts that `pack` chooses for the shape with full layers {0, 1}."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=shape.num_kv_heads, head_size=shape.head_size, dtype=shape.dtype
    )
    sizes = pack([[spec] * 2], [[spec] * (shape.num_layers - 2)], FLASH_ATTENTION)
    yield Place("compressed", "BLHNC", shape.num_layers - 2, sizes.larger, sizes.stride)
    yield Place("full", "BLHNC", 2, sizes.smaller, sizes.stride)
    yield Place("scan", "BLNHC", 2, sizes.smaller, sizes.stride)


def median_us_per_layer(shape: Shape, place: Place, load: Load, pool: torch.Tensor) -> float:
    """Returns the median over sweeps through all layers of the pool, the lowest of three since other work disturbs."""
    launch = [attention_of(shape, load, view) for view in views(shape, place, load, pool)]
    return min(statistics.median(sweeps(launch)) for _ in range(3))


def sweeps(launch: list[Callable[[], None]]) -> list[float]:
    """Returns the microseconds per layer of each sweep."""
    times = []
    for i in range(REPEATS + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # the host runs ahead, so that launches are not timed
        begin.record()
        for one_layer in launch:
            one_layer()
        end.record()
        end.synchronize()
        if i >= 1:
            times.append(begin.elapsed_time(end) * 1000 / len(launch))
    return times


def views(shape: Shape, place: Place, load: Load, pool: torch.Tensor) -> list[torch.Tensor]:
    """Each layer's `[num_blocks, num_kv_heads, block_size, 2 * head_size]` in the pool; at most 16 of them."""
    content, heads, tokens = 2 * shape.head_size, shape.num_kv_heads, place.block_size
    num_blocks = load.num_requests * -(-load.num_tokens // tokens) + 1
    page = tokens * shape.token_bytes
    inner = (tokens * content, content, 1) if place.layout.endswith("HNC") else (content, heads * content, 1)
    between = page if place.layout.startswith("B") else num_blocks * page
    size = shape.dtype.itemsize
    typed = pool.view(shape.dtype)
    return [
        torch.as_strided(
            typed, (num_blocks, heads, tokens, content), (place.stride // size, *inner), layer * between // size
        )
        for layer in range(min(place.num_layers, 16))
    ]


def attention_of(shape: Shape, load: Load, view: torch.Tensor) -> Callable[[], None]:
    """Returns one layer's decode attention, as `FlashAttentionImpl.forward` calls it."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    (num_requests, num_tokens, is_fresh), block_size = load, view.shape[2]
    keys, values = view.transpose(1, 2).split(shape.head_size, dim=-1)
    query = torch.randn(num_requests, shape.num_heads, shape.head_size, device="cuda").to(torch.bfloat16)
    out = torch.empty_like(query)
    num_columns = -(-num_tokens // block_size)
    num_blocks = num_requests * num_columns
    # Shuffled the same way for every layout. No request has block 0.
    generator = torch.Generator().manual_seed(block_size)
    order = torch.arange(num_blocks) if is_fresh else torch.randperm(num_blocks, generator=generator)
    table = (order.view(num_requests, num_columns) + 1).to(torch.int32).cuda()
    lengths = torch.full((num_requests,), num_tokens, dtype=torch.int32, device="cuda")
    starts = torch.arange(num_requests + 1, dtype=torch.int32, device="cuda")
    scales = {}
    if shape.dtype != torch.bfloat16:
        one = torch.ones(1, device="cuda").expand(num_requests, shape.num_kv_heads)
        query, scales = query.to(shape.dtype), {"q_descale": one, "k_descale": one, "v_descale": one}
    metadata = get_scheduler_metadata(
        batch_size=num_requests,
        max_seqlen_q=1,
        max_seqlen_k=num_tokens,
        num_heads_q=shape.num_heads,
        num_heads_kv=shape.num_kv_heads,
        headdim=shape.head_size,
        cache_seqlens=lengths,
        qkv_dtype=shape.dtype,
        cu_seqlens_q=starts,
        page_size=block_size,
        causal=True,
        window_size=(-1, -1),
        num_splits=32,
    )

    def launch() -> None:
        flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=num_tokens,
            softmax_scale=shape.head_size**-0.5,
            causal=True,
            block_table=table,
            scheduler_metadata=metadata,
            num_splits=32,
            fa_version=3,
            **scales,
        )

    return launch


if __name__ == "__main__":
    main()
