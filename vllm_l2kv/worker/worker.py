"""Base of the workers for all devices: declares layer classes and carries out orders."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerBase

from vllm_l2kv.kernels import Compactor
from vllm_l2kv.kv_cache_spec import (
    CompressedLayerSpec,
    Geometry,
    capacity_of,
    classify_layers,
    group_layer_specs,
    group_window,
    is_packed,
)
from vllm_l2kv.messages.orders import compacted_hits_of, orders_of, with_seconds
from vllm_l2kv.profile import Profile
from vllm_l2kv.refusals import check_profile, check_supported
from vllm_l2kv.scorers import Heads, Scorers, bind
from vllm_l2kv.scorers.learned import weights_of
from vllm_l2kv.settings import Settings
from vllm_l2kv.worker.clock import Clock
from vllm_l2kv.worker.runner import Runner


class Layer(NamedTuple):
    """A compressed layer of this rank.

    Attributes:
        number: Its index in the model.
        attention: vLLM's attention layer.
        spec: Of its cache.
    """

    number: int
    attention: Any
    spec: CompressedLayerSpec


GroupLayers = Mapping[int, Sequence[Layer]]
"""Compressed KV-cache groups to their layers."""


class CompactionWorker(WorkerBase):
    """Mixin for one of vLLM's worker classes.

    A subclass implements for its device: `_packed_layouts`, `_make_compactors`, `_make_clock` and `_adapt_runner`.

    Attributes:
        attention_backends: vLLM's names of attention backends that read lengths only where compaction changes them.
    """

    attention_backends: ClassVar[tuple[str, ...]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_supported(self.vllm_config)
        self.settings = Settings.from_config(self.vllm_config.additional_config)
        profile = self.settings.profile
        self._weights = None if profile is None else weights_of(Profile.read(profile))

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs, as full and compressed layers. By now the model is loaded, and its files are here."""
        check_profile(self.vllm_config)
        specs: dict[str, KVCacheSpec] = classify_layers(super().get_kv_cache_spec(), self.settings, self._geometry())
        self._is_packed = is_packed(specs.values())
        for name, spec in specs.items():
            if isinstance(spec, CompressedLayerSpec):
                check_attention(name, self._layers[name], self.attention_backends)
        return specs

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """vLLM's layouts, or those that can hold groups of different page sizes in one pool."""
        layouts: list[str] = super().get_supported_kv_cache_layouts()
        return [layout.name for layout in self._packed_layouts()] if self._is_packed else layouts

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Same contract as upstream; then makes the compactors and adapts the runner."""
        super().initialize_from_config(kv_cache_config)
        layers: dict[int, list[Layer]] = {}
        for group_id, group in enumerate(kv_cache_config.kv_cache_groups):
            for name, spec in group_layer_specs(group).items():
                if isinstance(spec, CompressedLayerSpec):
                    layers.setdefault(group_id, []).append(Layer(extract_layer_index(name), self._layers[name], spec))
        self._compressed_group_ids = tuple(layers)
        self._compactors = self._make_compactors(layers)
        self._clock = self._make_clock()
        self._runner = self._adapt_runner(self._compressed_group_ids)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Compacts, then runs the step.

        The order of work on the device makes this safe: the previous step has written the sources, and requests that
        got the freed blocks write after the compaction.
        """
        orders = orders_of(scheduler_output)
        if orders:
            with self._clock.measure():
                for compactor in self._compactors:
                    compactor.compact(orders)
        gone = chain(scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or ())
        self._runner.begin_step(gone, orders, compacted_hits_of(scheduler_output))
        return self._with_seconds(super().execute_model(scheduler_output))

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Same contract as upstream, with times of compactions on the output."""
        return self._with_seconds(super().sample_tokens(*args, **kwargs))

    def kv_cache_groups(self) -> list[dict[str, Any]]:
        """The KV-cache groups of this engine, for `collective_rpc`."""
        return [
            {
                "layers": list(group.layer_names),
                "block_size": group.kv_cache_spec.block_size,
                "compressed": group_id in self._compressed_group_ids,
                "sliding_window": group_window(group),
            }
            for group_id, group in enumerate(self.model_runner.kv_cache_config.kv_cache_groups)
        ]

    def kv_capacity(self) -> dict[str, Any]:
        """What requests may hold of this engine's KV cache, for `collective_rpc`; `Capacity.from_plain` reads it."""
        return capacity_of(self.model_runner.kv_cache_config, self.vllm_config).as_plain()

    def num_evicted(self) -> dict[str, int]:
        """Compacted requests to their evicted tokens, for `collective_rpc`."""
        return self._runner.counts.by_request()

    def _with_seconds(self, output: Any) -> Any:
        """A step's output, with times of compactions if there are new ones; `None` stays `None`."""
        seconds = self._clock.take() if output is not None else []
        if not seconds:
            return output
        return (
            TimedOutput(output, seconds)
            if isinstance(output, AsyncModelRunnerOutput)
            else with_seconds(output, seconds)
        )

    def _bind(self, layers: Sequence[Layer], device: torch.device) -> Scorers:
        """Scorers of alike layers, the part of them that this rank holds."""
        rank, degree = get_tensor_model_parallel_rank(), self.vllm_config.parallel_config.tensor_parallel_size
        num_heads_of_model = self.vllm_config.model_config.get_total_num_kv_heads()
        heads = Heads.of_rank([layer.number for layer in layers], num_heads_of_model, rank, degree, device)
        return bind(heads, self._weights)

    @property
    def _layers(self) -> dict[str, Any]:
        layers: dict[str, Any] = self.vllm_config.compilation_config.static_forward_context
        return layers

    def _geometry(self) -> Geometry | None:
        """What this device's attention kernels want of packed blocks."""
        return None

    def _packed_layouts(self) -> list[KVCacheLayout]:
        """Block-outermost layouts that this device's attention kernels read, most preferred first."""
        raise NotImplementedError

    def _make_compactors(self, layers: GroupLayers) -> Sequence[Compactor]:
        """What moves rows of these layers, each of them in one compactor."""
        raise NotImplementedError

    def _make_clock(self) -> Clock:
        """What measures the compactors."""
        raise NotImplementedError

    def _adapt_runner(self, group_ids: Sequence[int]) -> Runner:
        """Makes the runner's compressed groups physical."""
        raise NotImplementedError


class TimedOutput(AsyncModelRunnerOutput):
    """The output of a step in flight, with times of compactions."""

    def __init__(self, output: AsyncModelRunnerOutput, seconds: list[float]) -> None:
        self._output = output
        self._seconds = seconds

    def get_output(self) -> Any:
        """Same contract as upstream: waits for the output."""
        return with_seconds(self._output.get_output(), self._seconds)

    def get_kv_connector_output(self) -> Any:
        """Same contract as upstream, new in 0.33: what a failed step leaves to the KV connector."""
        return self._output.get_kv_connector_output()


def check_attention(name: str, layer: Any, backends: Sequence[str]) -> None:
    """Refuses attention whose results would be wrong after a compaction.

    Args:
        name: The layer's name.
        layer: vLLM's attention layer.
        backends: Names of the backends whose way of finding lengths is known.

    Raises:
        ValueError: Another backend, or ALiBi.
    """
    backend = layer.attn_backend.get_name()
    if backend not in backends:
        raise ValueError(
            f"Layer {name} uses the attention backend {backend}, which may read lengths that compaction does not "
            f"change; set --attention-backend {backends[0]}."
        )
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        raise ValueError(
            f"Layer {name} uses ALiBi, whose biases follow slots, not positions; serve this model with stock vLLM."
        )
