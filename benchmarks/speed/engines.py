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
