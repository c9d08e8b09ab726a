"""Computes a plan: memory, block layouts, and a row for each engine and keep ratio or budget."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, TypeVar

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec, SlidingWindowSpec

from vllm_l2kv.kv_cache_spec import FLASH_ATTENTION, Geometry, classify_ranks, token_bytes
from vllm_l2kv.messages.usage import MEMORY_RATIO_DIGITS
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.plugin import CPU_BLOCK_SIZE
from vllm_l2kv.policy import Intervals
from vllm_l2kv.profile import Profile
from vllm_l2kv.settings import Settings
from vllm_l2kv.tools.plan.capacity import Cache, Document, Request, cache_of
from vllm_l2kv.tools.plan.model import Model, model_of, of_pipeline_ranks, read_config, weight_bytes

GIB = 2**30
Spec = TypeVar("Spec", bound=KVCacheSpec)
Ranks = Sequence[Mapping[str, KVCacheSpec]]
"""Specs of the layers on each pipeline rank."""


@dataclass(frozen=True)
class Device:
    """Constants of a device.

    Attributes:
        stock_block_size: Default tokens per block in stock vLLM.
        block_size: Default tokens per block in vllm-l2kv.
        geometry: Geometry of packed blocks that the worker requires.
        num_steps: Most steps in flight at once on one pipeline rank; each further rank adds one.
    """

    stock_block_size: int
    block_size: int
    geometry: Geometry | None
    num_steps: int


DEVICES = {"cuda": Device(16, 16, FLASH_ATTENTION, num_steps=2), "cpu": Device(128, CPU_BLOCK_SIZE, None, num_steps=1)}


def report(options: Namespace) -> dict[str, Any]:
    """The whole output of `vllm-l2kv plan`, as JSON-serializable values.

    Args:
        options: Options of the command line.

    Raises:
        ValueError: The model cannot be planned, there is too little memory, or copies do not fill the fleet.
    """
    num_gpus = gpus_of_copy(options)
    if options.gpus and options.gpus % num_gpus:
        raise ValueError(
            f"argument --gpus: must be a multiple of the {num_gpus} GPUs that share the model "
            f"(--tensor-parallel-size times --pipeline-parallel-size), got {options.gpus}."
        )
    config = read_config(options.model)
    model = model_of(config, options.dtype)
    if options.kv_profile:
        _check_profile(Profile.read(options.kv_profile), model)
    memory = _memory(options, config, model.dtype)
    device = DEVICES[options.device]

    def ranks(block_size: int) -> Ranks:
        specs = model.specs(block_size, options.kv_cache_dtype, options.tensor_parallel_size)
        return of_pipeline_ranks(specs, len(model.layer_types), options.pipeline_parallel_size)

    def cache(layers: Ranks) -> Cache:
        num_bytes = int(memory["kv_cache_gib"] * GIB)
        num_steps = device.num_steps + options.pipeline_parallel_size - 1
        return cache_of(layers, num_bytes, options.max_num_batched_tokens, num_steps)

    stock = cache(ranks(device.stock_block_size))
    settings = Settings(options.full_layers, options.full_heads)
    dealt = model.num_kv_heads, options.tensor_parallel_size
    compressed = cache(classify_ranks(ranks(device.block_size), settings, device.geometry, *dealt))
    return {
        "model": options.model,
        "num_prompt_tokens": options.context,
        "num_output_tokens": options.output,
        "num_document_tokens": options.document_tokens,
        "num_gpus": num_gpus,
        "num_replicas": options.gpus // num_gpus if options.gpus else None,
        "memory_of_a_gpu": memory,
        "bytes_per_token": _bytes_per_token(ranks(1)),
        "state_bytes": _state_bytes(ranks(1)),
        "full_layers": sorted(options.full_layers),
        "full_heads": settings.as_config()["full_heads"],
        "profile": options.kv_profile,
        "engines": [
            {"engine": "stock", **_layout(stock), "rows": [_row(stock, CompressionParams(), options)]},
            {
                "engine": "vllm-l2kv",
                **_layout(compressed),
                "rows": [_row(compressed, params, options) for params in _compared(options)],
            },
        ],
    }


def _check_profile(profile: Profile, model: Model) -> None:
    """Rejects a profile whose model has another KV cache; weights are not compared.

    Raises:
        ValueError: Layers, KV heads or their size differ.
    """
    if profile.shape != model.shape:
        raise ValueError(
            f"argument --kv-profile: {profile.path} was made for another model, {profile.model}: layers, KV heads or "
            "their size differ; give a profile of this model."
        )


def _memory(options: Namespace, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Memory of one GPU in GiB, and the source of the size of the weights."""
    if options.kv_cache_gib is not None:
        return {"kv_cache_gib": options.kv_cache_gib}
    if options.weights_gib is not None:
        weights, source = options.weights_gib * GIB, "--weights-gib"
    else:
        weights, source = weight_bytes(options.model, config, dtype)
    memory = {
        "gpu_gib": options.gpu_gib,
        "used_gib": options.gpu_gib * options.gpu_memory_utilization,
        "weights_gib": weights / gpus_of_copy(options) / GIB,
        "overhead_gib": options.overhead_gib,
    }
    left = memory["used_gib"] - memory["weights_gib"] - memory["overhead_gib"]
    return {**memory, "weights_source": source, "kv_cache_gib": left}


def gpus_of_copy(options: Namespace) -> int:
    """GPUs that share the model."""
    num_gpus: int = options.tensor_parallel_size * options.pipeline_parallel_size
    return num_gpus


def _bytes_per_token(ranks: Ranks) -> dict[str, int]:
    """Bytes per token in all layers of each kind, on the GPU that has most of them."""
    of_class = {"full_attention": FullAttentionSpec, "sliding_window": SlidingWindowSpec}
    return {name: max(token_bytes([_of(kind, rank)]) for rank in ranks) for name, kind in of_class.items()}


def _state_bytes(ranks: Ranks) -> int:
    """Bytes per request for states in all recurrent layers, independent of its length, on the GPU that has most."""
    states = [[replace(state, page_size_padded=None) for state in _of(MambaSpec, rank)] for rank in ranks]
    totals: list[int] = [sum(state.page_size_bytes for state in of_rank) for of_rank in states]
    return max(totals)


def _of(kind: type[Spec], specs: Mapping[str, KVCacheSpec]) -> list[Spec]:
    """The specs of this kind."""
    return [spec for spec in specs.values() if isinstance(spec, kind)]


def _layout(cache: Cache) -> dict[str, Any]:
    return {
        "num_blocks": cache.num_blocks,
        "block_bytes": cache.block_bytes,
        "groups": [
            {
                "kind": group.kind,
                "layers": len(group.specs),
                "heads": group.num_heads,
                "block_size": group.spec.block_size,
            }
            for group in cache.groups
        ],
    }


def _compared(options: Namespace) -> list[CompressionParams]:
    """No compression, then the ratios, then the budgets.

    Raises:
        ParamError: A budget is less than the number of protected tokens.
    """
    first, last = options.protect
    ratios = [CompressionParams(ratio, first, last) for ratio in dict.fromkeys((1.0, *options.ratio))]
    return ratios + [
        CompressionParams(max_tokens=budget, protect_first=first, protect_last=last) for budget in options.budgets
    ]


def _row(cache: Cache, params: CompressionParams, options: Namespace) -> dict[str, Any]:
    intervals = Intervals(options.prompt_interval, options.answer_interval)
    request = Request(options.context, options.output, params, intervals)
    answer_blocks = cache.answer_blocks(request)
    return {
        "keep_ratio": params.keep_ratio,
        "max_tokens": params.max_tokens,
        "kept_rows": request.kept_rows,
        "peak_rows": request.peak_rows,
        "memory_ratio": round(cache.memory_ratio(request.num_prompt_tokens, request.kept_rows), MEMORY_RATIO_DIGITS),
        "prompt_blocks": cache.prompt_blocks(request),
        "compacted_blocks": cache.compacted_blocks(request),
        "answer_blocks": max(answer_blocks),
        "mean_blocks": round(fmean(answer_blocks), 1),
        "at_once": cache.num_at_once(request),
        "on_average": round(cache.num_on_average(request), 1),
        "longest_request": cache.longest(params, intervals),
        **(_documents(cache, Document(options.document_tokens, params, intervals)) if options.document_tokens else {}),
    }


def _documents(cache: Cache, document: Document) -> dict[str, Any]:
    return {
        "document_rows": document.num_keep,
        "document_blocks": cache.document_blocks(document),
        "documents": cache.num_documents(document),
    }
