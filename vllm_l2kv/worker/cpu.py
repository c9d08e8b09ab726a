"""The worker for CPUs."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_l2kv.kernels import Compactor
from vllm_l2kv.kernels.reference import ReferenceCompactor
from vllm_l2kv.kv_cache_spec import CompressedLayerSpec
from vllm_l2kv.seams import draft_layers
from vllm_l2kv.worker.clock import Clock, HostClock
from vllm_l2kv.worker.rows import cpu_rows
from vllm_l2kv.worker.runner import Runner
from vllm_l2kv.worker.runner_v1 import RunnerV1
from vllm_l2kv.worker.worker import AlikeLayers, CompactionWorker


class L2KVCPUWorker(CompactionWorker, CPUWorker):
    """vLLM's CPU worker, extended to compact with the torch reference."""

    attention_backends = ("CPU_ATTN",)

    def determine_available_memory(self) -> int:
        """Same contract as upstream; also runs the warm-up that upstream skips in eager mode.

        In the warm-up, later pipeline ranks allocate buffers for the tensors of the previous rank. Without the buffers
        vLLM's engine fails at its first step.
        """
        available: int = super().determine_available_memory()
        if not get_pp_group().is_first_rank and self.model_runner.intermediate_tensors is None:
            self.model_runner.profile_run()
        return available

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Same contract as `CompactionWorker`."""
        check_draft_groups(kv_cache_config, draft_layers(self.model_runner, self._layers))
        super().initialize_from_config(kv_cache_config)

    def _packed_layouts(self) -> list[KVCacheLayout]:
        # The backend declares LBHNC only, but its kernels read head-major blocks at any stride.
        return [KVCacheLayout.BLHNC]

    def _make_compactors(self, layers: AlikeLayers) -> Sequence[Compactor]:
        for _, group in layers:
            check_cpu_layout(group[0].attention.isa, group[0].spec)
        return [
            ReferenceCompactor(
                group_id,
                [cpu_rows(layer.attention.kv_cache, layer.spec.head_size) for layer in group],
                self._bind(group, torch.device("cpu")),
            )
            for group_id, group in layers
        ]

    def _wait_for_device(self) -> None:
        """Returns at once: no work is in flight on a CPU."""

    def _make_clock(self) -> Clock:
        return HostClock()

    def _adapt_runner(self, group_ids: Sequence[int]) -> Runner:
        return RunnerV1(self.model_runner, group_ids)


def check_draft_groups(kv_cache_config: Any, drafts: Collection[str]) -> None:
    """Rejects a draft model whose rows runner V1 would write into blocks of other layers.

    Runner V1 gives the draft model the block table of the first KV-cache group, whichever groups its layers are in.

    Args:
        kv_cache_config: vLLM's KV-cache configuration.
        drafts: Names of the draft model's layers.

    Raises:
        ValueError: The draft model's layers are not all in one group.
    """
    if not set(drafts).issubset(kv_cache_config.kv_cache_groups[0].layer_names):
        raise ValueError(
            f"On CPUs all layers of a draft model must be in one KV-cache group, but vLLM spreads its {len(drafts)} "
            "layers over several; name more or fewer layers in --kv-full-layers, or a draft model with fewer layers."
        )


def check_cpu_layout(isa: str, spec: CompressedLayerSpec) -> None:
    """Checks that rows written by vLLM's kernel for this instruction set can be read through `rows.cpu_rows`.

    vLLM packs keys differently for some instruction sets (AMX, Arm). Read as rows, they would silently give wrong
    scores and moves.

    Args:
        isa: vLLM's name of the attention kernel's instruction set.
        spec: Spec of the layer's cache.

    Raises:
        ValueError: The kernel uses another layout of keys or values.
    """
    shape = (spec.block_size, spec.num_kv_heads, spec.head_size)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(shape, generator=generator).to(spec.dtype) for _ in range(2))
    cache = torch.zeros(1, spec.num_kv_heads, spec.block_size, 2 * spec.head_size, dtype=spec.dtype)
    halves = cache.view(1, spec.num_kv_heads, 2 * spec.block_size, spec.head_size).chunk(2, dim=2)
    slots = torch.arange(spec.block_size)
    ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")
    rows = cpu_rows(cache, spec.head_size)
    if not (torch.equal(rows.keys[0], keys.transpose(0, 1)) and torch.equal(rows.values[0], values.transpose(0, 1))):
        raise ValueError(
            f"vllm-l2kv does not support the cache layout of vLLM's CPU attention kernel {isa!r}; serve on a machine "
            "where vLLM uses the kernel 'vec', or with --dtype float32."
        )
