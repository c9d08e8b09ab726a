"""The two engines that benchmarks compare, in the process that asks for one."""

import os
from typing import Any


def start(engine: str, model: str, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Starts vLLM with made-up weights.

    Args:
        engine: `stock` or `l2kv`.
        model: Folder with a `config.json`.
        arguments: More of vLLM's engine arguments.

    Returns:
        The `LLM`, and what a result row says about it.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    import vllm

    import vllm_l2kv

    ours = vllm_l2kv.engine_args(full_layers=(0, 1)) if engine == "l2kv" else {}
    llm = vllm.LLM(
        model,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=16384,
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        disable_log_stats=True,
        skip_tokenizer_init=True,
        **ours,
        **arguments,
    )
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    return llm, {
        "gpu": torch.cuda.get_device_name(),
        "vllm": vllm.__version__,
        "commit": os.environ.get("COMMIT", ""),
        "engine": engine,
        "groups": [(len(group.layer_names), group.kv_cache_spec.block_size) for group in groups],
    }


def add_requests(
    llm: Any, num_requests: int, num_prompt_tokens: int, num_output_tokens: int, ratio: float | None, seed: int
) -> list[str]:
    """Adds greedy requests with random prompts of their own, and returns their ids.

    Args:
        llm: The engine.
        num_requests: How many.
        num_prompt_tokens: Length of each prompt.
        num_output_tokens: Generated tokens of each.
        ratio: Keep ratio, or `None` to ask for nothing.
        seed: Another seed makes other prompts, which share no prefix.
    """
    import numpy as np
    from vllm import SamplingParams

    import vllm_l2kv

    params = SamplingParams(
        temperature=0,
        ignore_eos=True,
        max_tokens=num_output_tokens,
        detokenize=False,
        extra_args=None if ratio is None else vllm_l2kv.compression(ratio),
    )
    random = np.random.default_rng(seed)
    req_ids = [f"{seed}-{i}" for i in range(num_requests)]
    for req_id in req_ids:
        prompt = random.integers(1000, 100_000, num_prompt_tokens).tolist()
        llm.llm_engine.add_request(req_id, {"prompt_token_ids": prompt}, params)
    return req_ids
