"""The worker for NVIDIA GPUs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu_worker import Worker

from vllm_l2kv.kernels.triton import TORCH_BYTES, GroupCache, GroupCompactor, scratch_bytes, torch_bytes_of_a_head
from vllm_l2kv.kv_cache_spec import FLASH_ATTENTION, CompressedLayerSpec, Geometry, key_dtype
from vllm_l2kv.messages.orders import CompactionOrder
from vllm_l2kv.worker.clock import Clock, CUDAClock
from vllm_l2kv.worker.runner_v2 import RunnerV2
from vllm_l2kv.worker.worker import CompactionWorker, Compactor, GroupLayers, Runner


class L2KVGPUWorker(CompactionWorker, Worker):
    """vLLM's GPU worker that compacts, with Triton kernels."""

    attention_backends = ("FLASH_ATTN",)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """As ours for every device; notes how much memory the kernels will need beside the cache."""
        specs = super().get_kv_cache_spec()
        compressed = [spec for spec in specs.values() if isinstance(spec, CompressedLayerSpec)]
        longest = self.vllm_config.model_config.max_model_len
        self._scratch_bytes = scratch_bytes(sum(spec.num_kv_heads for spec in compressed), longest)
        self._scratch_bytes += max(
            TORCH_BYTES, *(torch_bytes_of_a_head(spec.head_size, longest) for spec in compressed)
        )
        return specs

    def determine_available_memory(self) -> int:
        """As vLLM's, less what the kernels will need; a cache of a size that somebody asked for stays."""
        available: int = super().determine_available_memory()
        return available if self.vllm_config.cache_config.kv_cache_memory_bytes else available - self._scratch_bytes

    def _geometry(self) -> Geometry:
        # A block size that somebody asked for stays; its stride may still be padded.
        asked = self.vllm_config.cache_config.user_specified_block_size
        return replace(FLASH_ATTENTION, page=0) if asked else FLASH_ATTENTION

    def _packed_layouts(self) -> list[KVCacheLayout]:
        return [KVCacheLayout.BLHNC]

    def _make_compactor(self, layers: GroupLayers) -> Compactor:
        compactor = TritonCompactor(layers, self.vllm_config.model_config.max_model_len)
        compactor.warm_up()
        return compactor

    def _make_clock(self) -> Clock:
        return CUDAClock()

    def _adapt_runner(self, group_ids: Sequence[int]) -> Runner:
        runner = RunnerV2(self.model_runner, group_ids)
        runner.warm_up()
        return runner


class TritonCompactor:
    """The kernels, once for all layers of a group that are alike.

    Args:
        layers: Compressed groups to their attention layers and specs.
        max_num_tokens: Longest prompt.
    """

    def __init__(self, layers: GroupLayers, max_num_tokens: int) -> None:
        alike: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        for group_id, group in layers.items():
            for layer, spec in group:
                cache = layer.kv_cache
                like = (group_id, spec.head_size, key_dtype(spec), cache.dtype, cache.shape, cache.stride())
                alike.setdefault(like, []).append(cache)
        self._compactors = [
            GroupCompactor(GroupCache.of(caches, head_size, dtype), group_id, max_num_tokens)
            for (group_id, head_size, dtype, *_), caches in alike.items()
        ]

    def warm_up(self) -> None:
        """Compiles the kernels."""
        for compactor in self._compactors:
            compactor.warm_up()

    def compact(self, orders: Sequence[CompactionOrder]) -> None:
        """Launches the kernels for all orders of a step."""
        for compactor in self._compactors:
            compactor.compact(orders)
