"""Time of compaction by each scorer that requests can name, by single tokens and blocks, relative to `l2`.

python -m benchmarks.speed.scorers --out h100_scorers.jsonl
python -m benchmarks.speed.scorers --out again.jsonl --scorers keydiff_value --granularities token
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.speed.compaction import HEAD_SIZE, NUM_KV_HEADS, NUM_LAYERS, compactor_of_8b, kernel_us, make_orders
from benchmarks.speed.compaction import median_us as device_us
from benchmarks.speed.rows import append, where
from vllm_l2kv.params import GRANULARITIES, OFFERED_SCORERS, CompressionParams
from vllm_l2kv.profile import Rope
from vllm_l2kv.scorers import Weights
from vllm_l2kv.scorers.learned import DTYPES, num_features, shapes_of_a_head

LENGTHS = (1000, 8000, 30_000)
KEEP_RATIO = 0.5
BUSY_MS = 100
REPEATS = 5


def main() -> None:
    """Times one prompt of the 8B shape at several lengths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scorers", nargs="+", choices=OFFERED_SCORERS, default=OFFERED_SCORERS)
    parser.add_argument("--granularities", nargs="+", choices=GRANULARITIES, default=GRANULARITIES)
    args = parser.parse_args()
    compactor = compactor_of_8b(max(LENGTHS), made_up_weights())
    begin = time.perf_counter()
    compactor.warm_up()
    torch.cuda.synchronize()
    warm_up_s = round(time.perf_counter() - begin, 1)
    cycles = cycles_of_ms(BUSY_MS)
    for granularity in args.granularities:
        for scorer in dict.fromkeys(["l2", *args.scorers]):
            params = CompressionParams(protect_first=0, protect_last=0, scorer=scorer, granularity=granularity)
            for n in LENGTHS:
                launch = partial(compactor.compact, make_orders(1, n, int(n * KEEP_RATIO), params))
                row = {
                    **where(),
                    "scorer": scorer,
                    "granularity": granularity,
                    "num_prompt_tokens": n,
                    "keep_ratio": KEEP_RATIO,
                    "us": round(device_us(launch), 1),
                    "host_ms": [round(ms, 2) for ms in host_ms(launch, cycles)],
                    "busy_ms": BUSY_MS,
                    "kernel_us": kernel_us(launch),
                    "warm_up_s": warm_up_s,
                }
                append(args.out, row)


def made_up_weights() -> Weights:
    """Returns random weights of the scorer `learned`, with as many slow pairs as Llama 3.1 8B has."""
    rope = Rope(HEAD_SIZE, interleaved=False, slow_pairs=18)
    f = num_features(HEAD_SIZE, HEAD_SIZE, rope)
    tensors = {
        name: torch.randn(NUM_LAYERS, NUM_KV_HEADS, *shape).div(f**0.5).to(DTYPES[name])
        for name, shape in shapes_of_a_head(f).items()
    }
    return Weights(tensors, rope)


def cycles_of_ms(ms: float, probe: int = 50_000_000) -> int:
    """Returns the argument with which `torch.cuda._sleep` keeps the device busy for so long."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(probe)
    begin.record()
    torch.cuda._sleep(probe)
    end.record()
    end.synchronize()
    return int(probe * ms / begin.elapsed_time(end))


def host_ms(launch, cycles: int) -> list[float]:
    """Returns how long calls block the host while the device is busy, in ascending order."""
    times = []
    for _ in range(REPEATS):
        torch.cuda._sleep(cycles)
        begin = time.perf_counter()
        launch()
        times.append((time.perf_counter() - begin) * 1e3)
        torch.cuda.synchronize()
    return sorted(times)


if __name__ == "__main__":
    main()
