"""What every worker of ours does, whatever the device: declare layer classes, obey orders, remember counts."""

from typing import Any, Protocol

import torch
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.worker_base import WorkerBase

from vllm_l2kv.kernels.reference import LayerRows, compact_layer
from vllm_l2kv.kv_cache_spec import CompressedLayerSpec, classify_layers, group_layer_specs
from vllm_l2kv.messages import CompactionOrder, GroupMove, orders_of
from vllm_l2kv.plugin import check_supported
from vllm_l2kv.settings import Settings
from vllm_l2kv.worker.slots import EvictedCounts


class RunnerAdapter(Protocol):
    """What the worker needs of a model runner."""

    def rewrite_row(self, req_id: str, move: GroupMove) -> None:
        """Points a request at the blocks of its kept rows."""


class CompactionWorker(WorkerBase):
    """Stands before one of vLLM's worker classes.

    A subclass names the device's layouts and rows: `_packed_layouts`, `_rows_of` and `_adapt_runner`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_supported(self.vllm_config)
        self.settings = Settings.from_config(self.vllm_config.additional_config)
        self._counts = EvictedCounts()

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs, as full and compressed layers."""
        specs: dict[str, KVCacheSpec] = classify_layers(super().get_kv_cache_spec(), self.settings)
        self._is_packed = len({spec.page_size_bytes for spec in specs.values()}) > 1
        return specs

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """vLLM's layouts, or those that can hold groups of different page sizes in one pool."""
        layouts: list[str] = super().get_supported_kv_cache_layouts()
        return [layout.name for layout in self._packed_layouts()] if self._is_packed else layouts

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """As vLLM's, then takes hold of the compressed groups."""
        super().initialize_from_config(kv_cache_config)
        self._rows: dict[int, list[LayerRows]] = {}
        context = self.vllm_config.compilation_config.static_forward_context
        for group_id, group in enumerate(kv_cache_config.kv_cache_groups):
            specs = group_layer_specs(group)
            compressed = [name for name, spec in specs.items() if isinstance(spec, CompressedLayerSpec)]
            if compressed:
                for name in compressed:
                    _check_attention(name, context[name])
                self._rows[group_id] = [self._rows_of(context[name], specs[name]) for name in compressed]
        self._runner: RunnerAdapter = self._adapt_runner(list(self._rows))

    def execute_model(self, scheduler_output: Any) -> Any:
        """Compacts, then runs the step.

        Device order makes this safe: the previous step has written the sources, and whoever received the freed blocks
        writes after us.
        """
        self._counts.forget(scheduler_output.finished_req_ids)
        self._counts.forget(scheduler_output.preempted_req_ids or ())
        for order in orders_of(scheduler_output):
            self._compact(order)
        return super().execute_model(scheduler_output)

    def kv_cache_groups(self) -> list[dict[str, Any]]:
        """The KV-cache groups of this engine, for `collective_rpc`."""
        return [
            {
                "layers": list(group.layer_names),
                "block_size": group.kv_cache_spec.block_size,
                "compressed": group_id in self._rows,
            }
            for group_id, group in enumerate(self.model_runner.kv_cache_config.kv_cache_groups)
        ]

    @torch.inference_mode()
    def _compact(self, order: CompactionOrder) -> None:
        for move in order.moves:
            source = torch.tensor(move.source, device=self.device)
            destination = torch.tensor(move.destination, device=self.device)
            for rows in self._rows[move.group_id]:
                compact_layer(
                    rows,
                    source,
                    destination,
                    order.num_prompt_tokens,
                    order.num_keep,
                    order.num_tokens,
                    order.protect_first,
                    order.protect_last,
                )
            self._runner.rewrite_row(order.req_id, move)
        self._counts.set(order.req_id, order.num_evicted)

    def _packed_layouts(self) -> list[KVCacheLayout]:
        """Block-outermost layouts that this device's attention kernels read, most preferred first."""
        raise NotImplementedError

    def _rows_of(self, layer: Any, spec: CompressedLayerSpec) -> LayerRows:
        """One attention layer's cache as rows."""
        raise NotImplementedError

    def _adapt_runner(self, group_ids: list[int]) -> RunnerAdapter:
        """Makes the runner's compressed groups physical."""
        raise NotImplementedError


def _check_attention(name: str, layer: Any) -> None:
    """Refuses attention that looks at the distance between slots.

    Raises:
        ValueError: The layer uses ALiBi.
    """
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        raise ValueError(
            f"Layer {name} uses ALiBi, whose biases follow slots, not positions; serve this model with stock vLLM."
        )
