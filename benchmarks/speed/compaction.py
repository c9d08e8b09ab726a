"""Time of compaction alone, compared with a copy of the same bytes.

python -m benchmarks.speed.compaction --out compaction.jsonl
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.speed.rows import append, where
from vllm_l2kv.kernels.group_cache import GroupCache
from vllm_l2kv.kernels.scratch import Scratch
from vllm_l2kv.kernels.triton_compactor import TritonCompactor
from vllm_l2kv.messages.orders import CompactionOrder, GroupMove
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.scorers import Heads, Weights, bind

NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE = 30, 8, 16, 128
NUM_BLOCKS = 10_000
STRIDE_BYTES = 1952 * 1024  # as `kv_cache_spec.pack` chooses it
LENGTHS = (1000, 8000, 15_000, 30_000)
REPEATS = 20


def main() -> None:
    """Times the 8B shape at several lengths and ratios, one prompt and eight at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    compactor = compactor_of_8b(8 * 15_000)
    for num_prompts in (1, 8):
        for n in LENGTHS:
            for ratio in (0.5, 0.25, 0.1):
                if num_prompts * n > 120_000:
                    continue
                orders = make_orders(num_prompts, n, int(n * ratio))
                launch = partial(compactor.compact, orders)
                us = median_us(launch)
                copy_us = median_us(copy_of(moved_bytes(num_prompts, n, int(n * ratio))))
                row = {
                    **where(),
                    "num_prompts": num_prompts,
                    "num_prompt_tokens": n,
                    "keep_ratio": ratio,
                    "us": round(us, 1),
                    "copy_us": round(copy_us, 1),
                    "multiple": round(us / copy_us, 2),
                    "host_us": round(host_us(launch), 1),
                    "kernel_us": kernel_us(launch),
                }
                append(args.out, row)


def compactor_of_8b(max_num_tokens: int, weights: Weights | None = None) -> TritonCompactor:
    """Returns a compactor for the 8B shape with two full layers and random rows in its cache.

    Args:
        max_num_tokens: Maximum number of rows in one launch.
        weights: Weights of scorers that need them.
    """
    content = 2 * HEAD_SIZE
    pool = torch.empty(NUM_BLOCKS, STRIDE_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_()
    page = NUM_KV_HEADS * BLOCK_SIZE * content
    views = [
        pool[:, layer * page : (layer + 1) * page].view(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, content)
        for layer in range(NUM_LAYERS)
    ]
    cache = GroupCache.of(views, HEAD_SIZE)
    scorers = bind(Heads.of_rank(range(NUM_LAYERS), NUM_KV_HEADS, 0, 1, pool.device), weights)
    return TritonCompactor(cache, scorers, 0, Scratch.of(cache.num_selections, HEAD_SIZE, max_num_tokens, pool.device))


UNPROTECTED = CompressionParams(protect_first=0, protect_last=0)


def make_orders(
    num_prompts: int, n: int, num_keep: int, params: CompressionParams = UNPROTECTED
) -> list[CompactionOrder]:
    """Returns orders over shuffled blocks; prompts may share source blocks, which are only read."""
    blocks = torch.randperm(NUM_BLOCKS).tolist()
    num_source, num_destination = -(-n // BLOCK_SIZE), -(-num_keep // BLOCK_SIZE)
    orders = []
    for i in range(num_prompts):
        begin = i * (num_source + num_destination) % (NUM_BLOCKS - num_source - num_destination)
        table = blocks[begin : begin + num_source + num_destination]
        move = GroupMove(0, tuple(table[:num_source]), tuple(table[num_source:]))
        counts = {"num_rows": n, "num_keep": num_keep, "num_evicted": n - num_keep}
        orders.append(CompactionOrder(req_id=str(i), params=params, moves=(move,), **counts))
    return orders


def moved_bytes(num_prompts: int, n: int, num_keep: int) -> int:
    """Returns the bytes that compaction must touch: keys read once for their norms, kept rows read and written."""
    row = 2 * HEAD_SIZE * 2
    return num_prompts * NUM_LAYERS * NUM_KV_HEADS * (n * row // 2 + 2 * num_keep * row)


def copy_of(num_bytes: int):
    """Returns a device-to-device copy that reads and writes `num_bytes` in total."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def median_us(launch) -> float:
    """Returns the median device time of a call, between events."""
    for _ in range(3):
        launch()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The host runs ahead, as under async scheduling, so that launches are not timed.
        torch.cuda._sleep(10_000_000)
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times)


def host_us(launch) -> float:
    """Returns the median host time of a call while the device is busy."""
    times = []
    for _ in range(REPEATS):
        torch.cuda._sleep(2_000_000)
        begin = time.perf_counter()
        launch()
        times.append((time.perf_counter() - begin) * 1e6)
        torch.cuda.synchronize()
    return statistics.median(times)


def kernel_us(launch) -> dict[str, float]:
    """Returns the device time of each kernel of a call, from PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        launch()
        torch.cuda.synchronize()
    events = profile.key_averages()
    return {event.key: round(event.device_time_total, 1) for event in events if event.device_time_total}


if __name__ == "__main__":
    main()
