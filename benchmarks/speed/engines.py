"""The two engines that benchmarks compare, and their requests."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.speed.rows import where

MAX_NUM_SEQS = 256
RATIOS = (None, 0.5, 0.25, 0.1)
"""Keep ratios to compare; `None` requests no compression."""


def start(
    engine: str, model: str, in_process: bool, settings: dict[str, Any] | None = None, **arguments: Any
) -> tuple[Any, dict[str, Any]]:
    """Starts vLLM, with random weights unless `load_format` is another one.

    Args:
        engine: `stock` or `l2kv`.
        model: Folder with a `config.json`.
        in_process: Run the engine core in this process, so that its scheduler is accessible, and not in a process of
            its own, as users run it.
        settings: Arguments of `vllm_l2kv.engine_args`, for `l2kv`.
        arguments: Further engine arguments of vLLM.

    Returns:
        The `LLM`, and its fields of a result row.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not in_process))
    import vllm

    import vllm_l2kv

    # No protected rows, so that the ratio alone decides how many are kept.
    unprotected = vllm_l2kv.engine_args(**(settings or {}), protect_first=0, protect_last=0)
    ours = unprotected if engine == "l2kv" else {}
    llm = vllm.LLM(
        model,
        disable_log_stats=True,
        skip_tokenizer_init=True,
        **{
            "load_format": "dummy",
            "dtype": "bfloat16",
            "max_num_seqs": MAX_NUM_SEQS,
            "max_num_batched_tokens": 8192,
            **ours,
            **arguments,
        },
    )
    parallel = llm.llm_engine.vllm_config.parallel_config
    about = {
        **where(),
        "num_gpus": parallel.world_size,
        "vllm": vllm.__version__,
        "engine": engine,
        "kv_cache_dtype": arguments.get("kv_cache_dtype", "auto"),
        "num_blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
    }
    return llm, {**about, **blocks_of(llm)} if in_process else about


def blocks_of(llm: Any) -> dict[str, Any]:
    """Returns the fields of a result row about the KV cache of an engine in this process; bytes are per GPU."""
    config = scheduler_of(llm).kv_cache_config
    return {
        "groups": [(len(group.layer_names), group.kv_cache_spec.block_size) for group in config.kv_cache_groups],
        # Tensors of several groups alias one allocation.
        "block_bytes": max(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks,
    }


def is_measured(about: dict[str, Any], ratio: float | None, name: str | None, only: list[str]) -> bool:
    """Whether a scenario's case belongs to this run; stock vLLM has no ratios.

    Args:
        about: The fields from `start`.
        ratio: The case's keep ratio, or `None`.
        name: The case's name for `--only`; by default its ratio.
        only: Names of the cases to run; all if empty.
    """
    name = str(ratio or 1.0) if name is None else name
    return (ratio is None or about["engine"] != "stock") and (not only or name in only)


def scheduler_of(llm: Any) -> Any:
    """Returns the scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def add_requests(
    llm: Any,
    num_requests: int,
    num_prompt_tokens: int,
    num_output_tokens: int,
    ratio: float | None,
    seed: int,
    budget: int | None = None,
) -> list[str]:
    """Adds greedy requests, each with a random prompt, and returns their ids.

    Args:
        llm: The engine.
        num_requests: Number of requests.
        num_prompt_tokens: Length of each prompt.
        num_output_tokens: Length of each answer.
        ratio: Keep ratio, or `None` for no compression.
        seed: Seed of the prompts; those of different seeds share no prefix.
        budget: `kv_max_tokens`, or `None` for none.
    """
    tokens = random_tokens(seed, num_requests * num_prompt_tokens)
    req_ids = [f"{seed}-{i}" for i in range(num_requests)]
    for i, req_id in enumerate(req_ids):
        prompt = tokens[i * num_prompt_tokens : (i + 1) * num_prompt_tokens]
        add_request(llm, req_id, prompt, num_output_tokens, keep_ratio=ratio, max_tokens=budget)
    return req_ids


def random_tokens(seed: int | Sequence[int], num_tokens: int) -> list[int]:
    """Returns random token ids that every model has."""
    import numpy as np

    return np.random.default_rng(seed).integers(1000, 40_000, num_tokens).tolist()


def add_request(llm: Any, req_id: str, prompt: list[int], num_output_tokens: int, **asked: Any) -> None:
    """Adds a greedy request; `asked` are arguments of `vllm_l2kv.compression`."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    import vllm_l2kv

    params = SamplingParams(
        temperature=0,
        ignore_eos=True,
        max_tokens=num_output_tokens,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=vllm_l2kv.compression(**asked) or None,
    )
    llm.llm_engine.add_request(req_id, {"prompt_token_ids": prompt}, params)


def step_until_all_decode(llm: Any, num_requests: int) -> None:
    """Runs steps until every request has some tokens of its answer.

    Raises:
        RuntimeError: The KV cache does not hold all requests at once.
    """
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    while not (len(scheduler.running) == num_requests and all(r.num_output_tokens > 4 for r in scheduler.running)):
        if not engine.has_unfinished_requests():
            raise RuntimeError(f"{num_requests} requests do not fit into the KV cache at once.")
        engine.step()


def abort_all(llm: Any, req_ids: list[str]) -> None:
    """Aborts requests and runs the engine until it is idle."""
    llm.llm_engine.abort_request(req_ids)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


@contextmanager
def cache_of(llm: Any, num_bytes: int, block_bytes: int) -> Iterator[None]:
    """Reduces the engine's KV cache to `num_bytes` on each GPU, by holding all other blocks.

    To the scheduler this is the same as a start with `kv_cache_memory_bytes`, which would take another minute.
    """
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    assert scheduler_of(llm).kv_cache_manager.reset_prefix_cache()
    held = pool.get_new_blocks(pool.get_num_free_blocks() - num_bytes // block_bytes)
    try:
        yield
    finally:
        pool.free_blocks(held)
