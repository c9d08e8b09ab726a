"""Cache write and decode attention of one layer with heads of two classes, in each possible way.

python -m benchmarks.speed.heads_attention --out heads_attention.jsonl [--loads 8x15000 ...] [--full 2]

An 8B shape in bf16, in full CUDA graphs; each graph runs 12 layers, whose blocks are shuffled. Full heads hold every
token, the others a share of them. Each row also has the difference of a way's outputs from those of two calls.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.speed.rows import append, where
from vllm_l2kv.kernels.head_pages import HeadPages, Held
from vllm_l2kv.kv_cache_spec import FLASH_ATTENTION
from vllm_l2kv.worker.by_head import Kind, Room, attend

HEAD, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS = 128, 32, 8, 12
GROUP = NUM_HEADS // NUM_KV_HEADS
PAGE, MAX_SPLITS = 16, 32
LOADS = ["1x128", "64x256", "24x6000", "8x15000", "128x1000", "256x500", "1x100000"]
SHARES = (1.0, 0.1)
"""Shares of the tokens that compressed heads hold."""


class Class(NamedTuple):
    """A class of heads: some heads of every layer, with their own blocks.

    Attributes:
        heads: Numbers of the heads, by layer.
        caches: `[num_blocks, num_heads, block_size, 2 * HEAD]`, by layer.
        held: The rows that requests hold.
    """

    heads: Sequence[Sequence[int]]
    caches: Sequence[torch.Tensor]
    held: Held


class Inputs(NamedTuple):
    """Inputs of one layer; the same for every way."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def main() -> None:
    """Writes a row for each load and share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--loads", nargs="+", default=LOADS)
    parser.add_argument("--full", type=int, default=2, help="full heads of each layer")
    args = parser.parse_args()
    pool = torch.empty(10 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    for load in args.loads:
        num_requests, num_tokens = map(int, load.split("x"))
        for share in SHARES:
            row = {**where(), "load": load, "full": args.full, "share": share}
            for name, number in measure(pool, num_requests, num_tokens, args.full, share):
                row[name] = float(f"{number:.4g}")
            append(args.out, row)


def measure(
    pool: torch.Tensor, num_requests: int, num_tokens: int, num_full: int, share: float
) -> Iterator[tuple[str, float]]:
    """Yields each way's name and microseconds per layer, and names and values of differences."""
    num_kept = max(int(num_tokens * share), 1)
    mean = max((num_full * num_tokens + (NUM_KV_HEADS - num_full) * num_kept) // NUM_KV_HEADS, 1)
    query, packed = torch.randn(2, num_requests, NUM_HEADS * HEAD, device="cuda", dtype=torch.bfloat16)
    keys, values = packed[:, : 2 * NUM_KV_HEADS * HEAD].view(num_requests, 2, NUM_KV_HEADS, HEAD).unbind(1)
    inputs = Inputs(query.view(num_requests, NUM_HEADS, HEAD), keys, values)
    right = torch.empty_like(inputs.query)
    for name, length in (("plain", num_tokens), ("equal counts", mean)):
        everything = one_class(pool, num_requests, length)
        yield name, time_layers(plain(everything, inputs, right, length))
    full, compressed = two_classes(pool, num_requests, num_tokens, num_kept, num_full)
    yield "two calls", time_layers(two_calls(full, compressed, inputs, right, num_tokens, num_kept))
    yield "two calls: largest output", right.abs().max().item()
    out = torch.empty_like(right)
    by_head = ByHead(full, compressed, inputs, out, num_tokens)
    yield "one call", time_layers(by_head.layer)
    yield "one call: difference", (out - right).abs().max().item()
    yield "one call, no schedule", time_layers(by_head.layer_without_schedule)
    yield "one call, no schedule: difference", (out - right).abs().max().item()
    yield "write alone", time_layers(by_head.write)
    by_head = ByHead(full, compressed, inputs, out, num_tokens, NUM_LAYERS)
    time_layers(by_head.write)
    yield "attention alone", time_layers(by_head.attention_alone)


def place(
    pool: torch.Tensor, heads: Sequence[Sequence[int]], num_requests: int, num_tokens: int, block_size: int,
    stride: int, ids: Iterator[int],
) -> Class:  # fmt: skip
    """Returns a class whose heads lie side by side in each block; blocks are `stride` elements apart."""
    content = 2 * HEAD
    num_columns = -(-num_tokens // block_size)
    table = torch.tensor([next(ids) for _ in range(num_requests * num_columns)], dtype=torch.int32)
    table = table.view(num_requests, num_columns).cuda()
    num_blocks = pool.numel() // stride
    caches, first = [], 0
    for of_layer in heads:
        shape = num_blocks, len(of_layer), block_size, content
        strides = stride, block_size * content, content, 1
        caches.append(torch.as_strided(pool, shape, strides, first * block_size * content))
        first += len(of_layer)
    lengths = torch.full((num_requests,), num_tokens, dtype=torch.int32, device="cuda")
    slots = table[:, -1].long() * block_size + (num_tokens - 1) % block_size
    return Class(heads, caches, Held(table, lengths, slots))


def shuffled(pool: torch.Tensor, stride: int) -> Iterator[int]:
    """Returns the ids of all blocks of the pool except 0, shuffled."""
    ids = list(range(1, pool.numel() // stride))
    random.Random(0).shuffle(ids)
    return iter(ids)


def two_classes(
    pool: torch.Tensor, num_requests: int, num_tokens: int, num_kept: int, num_full: int
) -> tuple[Class, Class]:
    """Returns both classes; which heads are full varies by layer, as in a profile."""
    chance = random.Random(1)
    full = [sorted(chance.sample(range(NUM_KV_HEADS), num_full)) for _ in range(NUM_LAYERS)]
    compressed = [[head for head in range(NUM_KV_HEADS) if head not in of_layer] for of_layer in full]
    factor = (NUM_KV_HEADS - num_full) // num_full
    of_compressed = NUM_LAYERS * (NUM_KV_HEADS - num_full) * PAGE * 2 * HEAD
    stride = FLASH_ATTENTION.padded(of_compressed * pool.itemsize) // pool.itemsize
    ids = shuffled(pool, stride)
    return (
        place(pool, full, num_requests, num_tokens, PAGE * factor, stride, ids),
        place(pool, compressed, num_requests, num_kept, PAGE, stride, ids),
    )


def one_class(pool: torch.Tensor, num_requests: int, num_tokens: int) -> Class:
    """Returns one class of all heads of every layer, as in an engine without full heads."""
    of_all = NUM_LAYERS * NUM_KV_HEADS * PAGE * 2 * HEAD
    stride = FLASH_ATTENTION.padded(of_all * pool.itemsize) // pool.itemsize
    heads = [range(NUM_KV_HEADS)] * NUM_LAYERS
    return place(pool, heads, num_requests, num_tokens, PAGE, stride, shuffled(pool, stride))


Way = Callable[[int], None]
"""Launches the work of a layer."""


def call(
    of_class: Class, layer: int, query: torch.Tensor, out: torch.Tensor, longest: int, schedule: torch.Tensor
) -> None:
    """FlashAttention as vLLM calls it."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    keys, values = of_class.caches[layer].transpose(1, 2).split(HEAD, dim=-1)
    flash_attn_varlen_func(
        q=query, k=keys, v=values, out=out, cu_seqlens_q=starts(query.shape[0]), max_seqlen_q=1,
        seqused_k=of_class.held.lengths, max_seqlen_k=longest, softmax_scale=HEAD**-0.5, causal=True,
        block_table=of_class.held.blocks, scheduler_metadata=schedule, num_splits=MAX_SPLITS, fa_version=3,
    )  # fmt: skip


@cache
def starts(num_requests: int) -> torch.Tensor:
    """Returns the offset of each request's query."""
    return torch.arange(num_requests + 1, dtype=torch.int32, device="cuda")


@cache
def one() -> torch.Tensor:
    """Returns the scale of keys and values, 1."""
    return torch.ones(1, device="cuda")


def schedule_of(of_class: Class, longest: int) -> torch.Tensor:
    """Returns the schedule that vLLM's builder makes once per step, outside of graphs."""
    from vllm.vllm_flash_attn import get_scheduler_metadata

    num_requests, cache = of_class.held.lengths.shape[0], of_class.caches[0]
    return get_scheduler_metadata(
        batch_size=num_requests, max_seqlen_q=1, max_seqlen_k=longest, num_heads_q=cache.shape[1] * GROUP,
        num_heads_kv=cache.shape[1], headdim=HEAD, cache_seqlens=of_class.held.lengths, qkv_dtype=torch.bfloat16,
        cu_seqlens_q=starts(num_requests), page_size=cache.shape[2], causal=True, num_splits=MAX_SPLITS,
    )  # fmt: skip


def store(of_class: Class, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Writes to the cache as vLLM does."""
    from vllm import _custom_ops as ops

    of_keys, of_values = of_class.caches[layer].transpose(1, 2).split(HEAD, dim=-1)
    ops.reshape_and_cache_flash(keys, values, of_keys, of_values, of_class.held.slots, "auto", one(), one())


def plain(everything: Class, inputs: Inputs, out: torch.Tensor, longest: int) -> Way:
    """Returns vLLM's way for layers with one class of heads."""
    schedule = schedule_of(everything, longest)

    def launch(layer: int) -> None:
        store(everything, layer, inputs.keys, inputs.values)
        call(everything, layer, inputs.query, out, longest, schedule)

    return launch


def two_calls(full: Class, compressed: Class, inputs: Inputs, out: torch.Tensor, longest: int, num_kept: int) -> Way:
    """Returns the way with a cache write and a call for each class, on copies of its heads."""
    num_requests = out.shape[0]
    parts = []
    for of_class, length in ((full, longest), (compressed, num_kept)):
        heads = [torch.tensor(of_layer, device="cuda") for of_layer in of_class.heads]
        of_query = [(of_layer[:, None] * GROUP + torch.arange(GROUP, device="cuda")).flatten() for of_layer in heads]
        own = torch.empty(num_requests, len(of_query[0]), HEAD, dtype=out.dtype, device="cuda")
        parts.append((of_class, heads, of_query, own, length, schedule_of(of_class, length)))

    def launch(layer: int) -> None:
        for of_class, heads, _, _, _, _ in parts:
            chosen = (rows.index_select(1, heads[layer]) for rows in (inputs.keys, inputs.values))
            store(of_class, layer, *chosen)
        for of_class, _, of_query, own, length, schedule in parts:
            call(of_class, layer, inputs.query.index_select(1, of_query[layer]), own, length, schedule)
            out.index_copy_(1, of_query[layer], own)

    return launch


class ByHead:
    """One call for both classes, after a write that also makes the layer's table.

    Args:
        full: The full heads.
        compressed: The other heads.
        inputs: Inputs of every layer.
        out: Output of every layer.
        longest: Tokens of the longest request.
        num_rooms: Buffers for tables: 1 as in an engine, or one per layer, to hold the tables of all layers at once.
    """

    def __init__(
        self, full: Class, compressed: Class, inputs: Inputs, out: torch.Tensor, longest: int, num_rooms: int = 1
    ) -> None:
        self.held = full.held, compressed.held
        self.inputs, self.out, self.longest = inputs, out, longest
        parts = zip(full.caches, compressed.caches, full.heads, compressed.heads, strict=True)
        self.pages = [pages for part in parts if (pages := HeadPages.of(*part)) is not None]
        assert len(self.pages) == NUM_LAYERS
        sizes = inputs.query.shape[0] * NUM_KV_HEADS, -(-longest // PAGE)
        self.rooms = [Room.of(*sizes, inputs.query.device) for _ in range(num_rooms)]

    def room(self, layer: int) -> Room:
        """Returns the buffer of the layer's table."""
        return self.rooms[layer % len(self.rooms)]

    def write(self, layer: int) -> None:
        """Runs the first launch of a layer."""
        inputs = self.inputs
        self.pages[layer].write(self.room(layer).sequences, inputs.keys, inputs.values, *self.held, one(), one())

    def attend(self, layer: int, is_first: bool) -> None:
        """Runs the second launch; the first layer also makes the schedule for all layers."""
        kind = Kind(HEAD**-0.5, 0.0, is_first)
        attend(self.pages[layer], kind, self.room(layer), self.inputs.query, self.out, MAX_SPLITS, self.longest, {})

    def layer(self, layer: int) -> None:
        """Runs a layer as in an engine."""
        self.write(layer)
        self.attend(layer, layer == 0)

    def layer_without_schedule(self, layer: int) -> None:
        """Runs a layer in which FlashAttention makes its own schedule."""
        self.write(layer)
        self.rooms[0].schedules.update(dict.fromkeys([self.pages[0].num_full]))
        self.attend(layer, False)

    def attention_alone(self, layer: int) -> None:
        """Runs attention on a table that exists already, in the layer's own buffer."""
        self.room(layer).schedules.update(self.room(0).schedules)
        self.attend(layer, layer == 0)


def time_layers(way: Way) -> float:
    """Returns the microseconds per layer in a CUDA graph, the median of several replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in range(NUM_LAYERS):
            way(layer)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(NUM_LAYERS):
            way(layer)
    times = []
    for _ in range(13):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / NUM_LAYERS)
    return statistics.median(times[3:])


if __name__ == "__main__":
    main()
