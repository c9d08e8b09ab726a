"""Host time of the scheduler alone, without an engine: stock vLLM's and ours, for requests that all decode.

PYTHONPATH=. VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/speed/scheduler.py --model FOLDER --out scheduler.jsonl

No device is needed; the model needs a `config.json`. Every request has 256 prompt tokens and generates 256.
"""

import argparse
import os
import random
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from rows import append

NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, REPEATS = 256, 256, 256, 5
NUM_LAYERS, NUM_BLOCKS = 32, 30_000
STEPS_IN_FLIGHT = 2
CASES = (("stock", None), ("l2kv", None), ("l2kv", 0.5))


def main() -> None:
    """Times all cases in turn, so that a slow moment of the machine strikes each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    schedulers = {engine: make_scheduler(engine, args.model) for engine in ("stock", "l2kv")}
    milliseconds: dict[Any, list[float]] = {case: [] for case in CASES}
    for repeat in range(REPEATS + 1):  # the first warms up
        for number, (engine, ratio) in enumerate(CASES):
            elapsed = run(schedulers[engine], ratio, seed=repeat * len(CASES) + number)
            milliseconds[engine, ratio] += [elapsed] if repeat else []
    for (engine, ratio), times in milliseconds.items():
        row = {"engine": engine, "keep_ratio": ratio or 1.0, "num_requests": NUM_REQUESTS}
        row["ms_per_step"] = round(statistics.median(times), 3)
        append(args.out, {"commit": os.environ.get("COMMIT", ""), **row})


def make_scheduler(engine: str, model: str) -> Any:
    """A scheduler of a model with `NUM_LAYERS` layers and `NUM_BLOCKS` blocks."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import (
        generate_scheduler_kv_cache_config,
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
        init_none_hash,
        resolve_kv_cache_block_sizes,
    )
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.structured_output import StructuredOutputManager

    import vllm_l2kv
    from vllm_l2kv.kv_cache_spec import classify_layers
    from vllm_l2kv.plugin import register
    from vllm_l2kv.scheduler.scheduler import L2KVScheduler
    from vllm_l2kv.settings import Settings

    register()
    init_none_hash(sha256)
    ours = vllm_l2kv.engine_args(full_layers=(0, 1)) if engine == "l2kv" else {}
    given = {
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": NUM_REQUESTS,
        "max_model_len": 2048,
        "block_size": 16,
    }
    config = EngineArgs(model=model, **{**ours, **given}).create_engine_config()
    config.scheduler_config.async_scheduling = True
    config.cache_config.kv_cache_layout = "BLHNC" if engine == "l2kv" else "LBNHC"
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
    specs: dict[str, Any] = {f"model.layers.{i}.self_attn": spec for i in range(NUM_LAYERS)}
    if engine == "l2kv":
        specs = classify_layers(specs, Settings((0, 1)))
    groups = get_kv_cache_groups(config, specs)
    num_bytes = NUM_BLOCKS * NUM_LAYERS * spec.page_size_bytes
    worker_config = get_kv_cache_config_from_groups(config, groups, num_bytes)
    kv_cache_config = generate_scheduler_kv_cache_config([worker_config])
    config.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
    block_size, hash_block_size = resolve_kv_cache_block_sizes(kv_cache_config, config)
    return (L2KVScheduler if engine == "l2kv" else AsyncScheduler)(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
        hash_block_size=hash_block_size,
        log_stats=False,
    )


def run(scheduler: Any, ratio: float | None, seed: int) -> float:
    """Milliseconds a step, from the first prefill to the last token."""
    add_requests(scheduler, ratio, seed)
    in_flight: deque[Any] = deque()
    num_steps, elapsed = 0, 0.0
    while scheduler.has_unfinished_requests():
        begin = time.perf_counter()
        output = scheduler.schedule()
        elapsed += time.perf_counter() - begin
        in_flight.append((output, sampled(scheduler, output)))
        num_steps += 1
        if len(in_flight) == STEPS_IN_FLIGHT:
            begin = time.perf_counter()
            scheduler.update_from_output(*in_flight.popleft())
            elapsed += time.perf_counter() - begin
    while in_flight:
        scheduler.update_from_output(*in_flight.popleft())
    return elapsed * 1000 / num_steps


def add_requests(scheduler: Any, ratio: float | None, seed: int) -> None:
    """Requests with random prompts, which share nothing."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    import vllm_l2kv

    chance = random.Random(seed)
    extra_args = None if ratio is None else vllm_l2kv.compression(ratio)
    hasher = get_request_block_hasher(scheduler.kv_cache_manager.block_pool.hash_block_size, sha256)
    for i in range(NUM_REQUESTS):
        scheduler.add_request(
            Request(
                request_id=f"{seed}-{i}",
                prompt_token_ids=[chance.randrange(40_000) for _ in range(NUM_PROMPT_TOKENS)],
                sampling_params=SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, extra_args=extra_args),
                pooling_params=None,
                block_hasher=hasher,
            )
        )


def sampled(scheduler: Any, output: Any) -> Any:
    """What a worker answers: one token for every request whose prefill ends or is over."""
    from vllm.v1.outputs import ModelRunnerOutput

    req_ids = list(output.num_scheduled_tokens)
    done = [scheduler.requests[r].num_computed_tokens >= NUM_PROMPT_TOKENS for r in req_ids]
    return ModelRunnerOutput(
        req_ids=req_ids,
        req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
        sampled_token_ids=[[7] if is_done else [] for is_done in done],
    )


if __name__ == "__main__":
    main()
