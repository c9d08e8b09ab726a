"""A real scheduler without an engine: vLLM's config and block pool, with made-up shapes of attention layers."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from classified import classify_layers
from engine import bare_rule
from vllm import SamplingParams
from vllm.config import KVEventsConfig, KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, MambaSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_l2kv import kv_cache_spec
from vllm_l2kv.kv_cache_spec import with_zeroed_blocks
from vllm_l2kv.params import FIELDS
from vllm_l2kv.plugin import register
from vllm_l2kv.seams import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm_l2kv.settings import Settings

OUR_ARGUMENTS = {"prompt_interval", "answer_interval", *(field.argument for field in FIELDS)}


class Plan(NamedTuple):
    """What schedulers are made from. A plan takes a second to make; a scheduler from it takes almost no time."""

    config: VllmConfig
    kv_cache_config: KVCacheConfig
    block_size: int
    hash_block_size: int

    def make(self, log_stats: bool = False) -> Scheduler:
        return self.config.scheduler_config.get_scheduler_cls()(
            vllm_config=self.config,
            kv_cache_config=self.kv_cache_config,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=self.block_size,
            hash_block_size=self.hash_block_size,
            log_stats=log_stats,
        )


def plan(
    model: Path | str,
    num_blocks: int,
    full_layers: tuple[int, ...] | None = (0,),
    num_layers: int = 5,
    block_size: int = 16,
    is_async: bool = False,
    kv_events: bool = False,
    cpu_blocks: int = 0,
    kv_connector: str | None = None,
    full_heads: tuple[tuple[int, tuple[int, ...]], ...] = (),
    specs: tuple[tuple[str, KVCacheSpec], ...] = (),
    drafter: tuple[tuple[str, Any], ...] = (),
    **arguments: Any,
) -> Plan:
    """Plans a scheduler with `num_blocks` free blocks; that of stock vLLM if `full_layers` is `None`.

    New blocks are zeroed, as on GPUs. With `cpu_blocks`, vLLM's connector offloads to that many blocks in CPU
    memory; `kv_connector` names another one. Layers have two KV heads; `full_heads` are the items of
    `Settings.full_heads`, hashable so that plans can be cached. `specs` are the layers of a particular model, in
    place of `num_layers` equal ones; Mamba states enter the prefix cache, if there is one. `drafter` are items of
    vLLM's speculative configuration. Other arguments are those of `vllm_l2kv.engine_args` and of vLLM's
    `EngineArgs`.
    """
    register()
    init_none_hash(sha256)
    is_ours = full_layers is not None
    if cpu_blocks:
        arguments["kv_transfer_config"] = cpu_memory(0)
    elif kv_connector:
        arguments["kv_transfer_config"] = KVTransferConfig(kv_connector=kv_connector, kv_role="kv_both")
    if drafter:
        # The draft model is not loaded here, but vLLM reads its config.
        of_model = {"model": str(model)} if "draft_model" in dict(drafter).values() else {}
        arguments["speculative_config"] = {**dict(drafter), **of_model}
    if kv_events:
        arguments["kv_events_config"] = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    rule = {name: arguments.pop(name) for name in OUR_ARGUMENTS & arguments.keys()}
    full = {"full_layers": full_layers, "full_heads": dict(full_heads)}
    ours = bare_rule(**full, metrics=True, **rule) if is_ours else {}
    with patch.dict(os.environ):  # for `NixlConnector` vLLM names another layout of states there
        config = EngineArgs(model=str(model), **{**ours, "block_size": block_size, **arguments}).create_engine_config()
    config.scheduler_config.async_scheduling = is_async
    config.cache_config.kv_cache_layout = "BLHNC" if is_ours else "LBNHC"
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=8, dtype=torch.float32)
    found = dict(specs) or {f"model.layers.{i}.self_attn": spec for i in range(num_layers)}
    if any(isinstance(spec, MambaSpec) for spec in found.values()) and config.cache_config.enable_prefix_caching:
        config.cache_config.mamba_cache_mode = "align"
        config.cache_config.mamba_block_size = block_size
    groups = get_kv_cache_groups(config, classify_layers(found, Settings(**full)) if is_ours else found)
    bytes_per_block = max(
        sum(s.page_size_bytes for s in getattr(g.kv_cache_spec, "kv_cache_specs", {}).values())
        or g.kv_cache_spec.page_size_bytes * len(g.layer_names)
        for g in groups
    )
    worker_config = get_kv_cache_config_from_groups(config, groups, bytes_per_block * (num_blocks + 1))
    kv_cache_config = generate_scheduler_kv_cache_config([worker_config])
    if is_ours:
        with patch.object(kv_cache_spec, "current_platform", SimpleNamespace(is_cpu=lambda: False)):
            kv_cache_config = with_zeroed_blocks(kv_cache_config)
    if cpu_blocks:
        extra = config.kv_transfer_config.kv_connector_extra_config
        extra["cpu_bytes_to_use"] = cpu_blocks * bytes_per_block
    config.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
    config.cache_config.block_size = block_size
    return Plan(config, kv_cache_config, *resolve_kv_cache_block_sizes(kv_cache_config, config))


def cpu_memory(num_bytes: int, **extra: Any) -> KVTransferConfig:
    """Arguments that switch offloading to CPU memory on."""
    extra = {"lazy_offload": True, "cpu_bytes_to_use": num_bytes, **extra}
    return KVTransferConfig(
        kv_connector="SimpleCPUOffloadConnector", kv_role="kv_both", kv_connector_extra_config=extra
    )


def add_request(
    scheduler: Scheduler, req_id: str, prompt: Sequence[int], params: SamplingParams, **about: Any
) -> Request:
    """Adds a request with hashes of its blocks, as the engine core does."""
    request = Request(
        request_id=req_id,
        prompt_token_ids=list(prompt),
        sampling_params=params,
        pooling_params=None,
        block_hasher=get_request_block_hasher(scheduler.kv_cache_manager.block_pool.hash_block_size, sha256),
        **about,
    )
    scheduler.add_request(request)
    return request
