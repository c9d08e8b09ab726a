"""The worker for NVIDIA GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu_worker import Worker

from vllm_l2kv.kernels import Compactor
from vllm_l2kv.kernels.group_cache import GroupCache
from vllm_l2kv.kernels.scratch import Scratch, scratch_bytes
from vllm_l2kv.kernels.triton_compactor import TritonCompactor
from vllm_l2kv.kv_cache_spec import FLASH_ATTENTION, CompressedLayerSpec, Geometry, full_name, key_dtype, mixed
from vllm_l2kv.log import logger_of
from vllm_l2kv.scorers import bytes_of_a_head
from vllm_l2kv.worker.by_head import (
    Room,
    attend_by_head,
    leave_schedules_to_calls,
    room_bytes,
    room_shape,
    takes_one_call,
)
from vllm_l2kv.worker.clock import Clock, CUDAClock
from vllm_l2kv.worker.runner import Runner
from vllm_l2kv.worker.runner_v2 import RunnerV2
from vllm_l2kv.worker.worker import AlikeLayers, CompactionWorker, Layer

logger = logger_of(__name__)


class L2KVGPUWorker(CompactionWorker, Worker):
    """vLLM's GPU worker, extended to compact with Triton kernels."""

    attention_backends = ("FLASH_ATTN", "TRITON_ATTN", "TRITON_FLASH_ATTN")

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Same contract as `CompactionWorker`; also computes how much memory the kernels need."""
        specs = super().get_kv_cache_spec()
        compressed = [spec for spec in specs.values() if isinstance(spec, CompressedLayerSpec)]
        shape = self._scratch_shape(compressed)
        self._scratch_bytes = scratch_bytes(*shape)
        if self._weights is not None:
            self._scratch_bytes += shape[0] * bytes_of_a_head(self._weights, self.settings.scorers)
        self._room_shape = self._shape_of_room(specs)
        if self._room_shape is not None:
            self._scratch_bytes += room_bytes(*self._room_shape)
        return specs

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Same contract as `CompactionWorker`; also lets mixed layers decode in one call of attention if possible."""
        super().initialize_from_config(kv_cache_config)
        names = mixed([name for group in kv_cache_config.kv_cache_groups for name in group.layer_names])
        if not names:
            return
        by_head: set[str] = set()
        if self._room_shape is not None:
            by_head = attend_by_head(self._layers, names, Room.of(*self._room_shape, self.device))
            leave_schedules_to_calls(self.model_runner.attn_groups, by_head)
        logger.info(
            "Of %d mixed layers (full and compressed KV heads), %d decode in one call of attention, the others in two.",
            len(names),
            len(by_head.intersection(names)),
        )

    def determine_available_memory(self) -> int:
        """Same contract as upstream, minus the kernels' memory; --kv-cache-memory-bytes is left unchanged."""
        available: int = super().determine_available_memory()
        return available if self.vllm_config.cache_config.kv_cache_memory_bytes else available - self._scratch_bytes

    def _geometry(self) -> Geometry:
        # An explicit --block-size is left unchanged; the stride between blocks may still be padded.
        asked = self.vllm_config.cache_config.user_specified_block_size
        return replace(FLASH_ATTENTION, page=0) if asked else FLASH_ATTENTION

    def _packed_layouts(self) -> list[KVCacheLayout]:
        return [KVCacheLayout.BLHNC]

    def _make_compactors(self, layers: AlikeLayers) -> Sequence[Compactor]:
        specs = [layer.spec for _, group in layers for layer in group]
        scratch = Scratch.of(*self._scratch_shape(specs), self.device)
        compactors = []
        for group_id, group in layers:
            compactors.append(TritonCompactor(cache_of(group), self._bind(group, self.device), group_id, scratch))
            compactors[-1].warm_up()
        return compactors

    def _scratch_shape(self, specs: Sequence[CompressedLayerSpec]) -> tuple[int, int, int]:
        """Arguments of `scratch_bytes` for one compactor of all these layers, the largest that is possible."""
        longest = self.vllm_config.model_config.max_model_len
        return sum(spec.num_kv_heads for spec in specs), max((spec.head_size for spec in specs), default=0), longest

    def _shape_of_room(self, specs: Mapping[str, KVCacheSpec]) -> tuple[int, int] | None:
        """Arguments of `Room.of`; `None` if no layer decodes by head."""
        names = [name for name in mixed(specs) if takes_one_call(self._layers[name].impl)]
        if not names or self.vllm_config.parallel_config.use_ubatching:
            return None
        page_size = min(specs[name].block_size for name in (names[0], full_name(names[0])))
        num_heads = max(self._layers[name].num_kv_heads for name in names)
        scheduler_config, model_config = self.vllm_config.scheduler_config, self.vllm_config.model_config
        return room_shape(num_heads, scheduler_config.max_num_seqs, model_config.max_model_len, page_size)

    def _wait_for_device(self) -> None:
        torch.cuda.current_stream().synchronize()

    def _make_clock(self) -> Clock:
        return CUDAClock()

    def _adapt_runner(self, group_ids: Sequence[int]) -> Runner:
        runner = RunnerV2(self.model_runner, group_ids)
        runner.warm_up()
        return runner


def cache_of(layers: Sequence[Layer]) -> GroupCache:
    """The caches of layers whose heads are alike."""
    spec = layers[0].spec
    return GroupCache.of([layer.attention.kv_cache for layer in layers], spec.head_size, key_dtype(spec))
