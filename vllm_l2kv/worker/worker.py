"""Base class of the workers for all devices: makes the specs of full and compressed caches, and carries out orders."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.ops.ssu_dispatch import initialize_mamba_ssu_backend
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerBase

from vllm_l2kv.kernels import Compactor
from vllm_l2kv.kv_cache_spec import (
    CompressedLayerSpec,
    FullLayerSpec,
    Geometry,
    capacity_of,
    classify_ranks,
    group_layer_specs,
    group_spec,
    group_window,
    is_packed,
    key_dtype,
    layer_name,
    mixed,
    with_borrowed_specs,
    with_own_layers,
    with_zeroed_blocks,
)
from vllm_l2kv.kv_heads import advice, classes_of, heads_of_rank
from vllm_l2kv.log import logger_of
from vllm_l2kv.messages.orders import compacted_hits_of, orders_of, with_seconds
from vllm_l2kv.profile import Profile
from vllm_l2kv.refusals import TRANSFERRING, TRANSFERS, check_profile, check_supported
from vllm_l2kv.scorers import Heads, Scorers, bind
from vllm_l2kv.scorers.learned import weights_of
from vllm_l2kv.seams import draft_layers
from vllm_l2kv.settings import Settings
from vllm_l2kv.worker.clock import Clock
from vllm_l2kv.worker.heads import check_split, split_attention
from vllm_l2kv.worker.runner import Runner, Step

logger = logger_of(__name__)


class Layer(NamedTuple):
    """The compressed heads of a layer on this rank.

    Attributes:
        number: Index of the layer in the model.
        heads: Indices of the heads in the model's layer, in the order of the cache.
        attention: vLLM's attention layer.
        spec: Spec of the heads' cache.
    """

    number: int
    heads: tuple[int, ...]
    attention: Any
    spec: CompressedLayerSpec


AlikeLayers = Sequence[tuple[int, Sequence[Layer]]]
"""Compressed layers, one entry for each compactor, with the id of their KV-cache group."""


class CompactionWorker(WorkerBase):
    """Mixin for one of vLLM's worker classes.

    A subclass implements `_packed_layouts`, `_make_compactors`, `_make_clock`, `_wait_for_device` and `_adapt_runner`
    for its device.

    Attributes:
        attention_backends: vLLM's names of the supported attention backends. They read lengths only from metadata that
            compaction changes.
    """

    attention_backends: ClassVar[tuple[str, ...]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_supported(self.vllm_config)
        self.settings = Settings.from_config(self.vllm_config.additional_config)
        profile = self.settings.profile
        self._weights = None if profile is None else weights_of(Profile.read(profile))
        transfer = self.vllm_config.kv_transfer_config
        if transfer is not None and transfer.kv_connector == TRANSFERRING:
            # vLLM looks for the connector's name there.
            transfer.kv_connector_module_path = TRANSFERS

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Same contract as upstream, with specs of full and compressed heads. By now the model's files are downloaded.

        Every pipeline rank classifies the layers of all ranks: blocks of a group have one size, and any layer may be
        named full.
        """
        # First, since the other ranks would wait forever for a rank that fails before it.
        pipeline_rank, found = of_pipeline_ranks(super().get_kv_cache_spec())
        check_profile(self.vllm_config)
        drafts = draft_layers(self.model_runner, self._layers)
        of_model = self.settings, self._geometry(), self._num_heads_of_model, self._degree
        ranks = classify_ranks(found, *of_model, drafts)
        self._is_packed = is_packed(spec for rank in ranks for spec in rank.values())
        specs = ranks[pipeline_rank]
        if self._is_packed:
            choose_mamba_kernel(specs, self.vllm_config)
        for name, spec in specs.items():
            if isinstance(spec, CompressedLayerSpec):
                check_attention(name, self._layers[name], self.attention_backends)
            if isinstance(spec, CompressedLayerSpec | FullLayerSpec):
                check_block_size(name, self._layers[layer_name(name)].get_attn_backend(), spec)
        for name in mixed(specs):
            check_split(name, self._layers)
        if len(ranks) == 1 and not drafts:
            advise_on_waste(specs)
        return specs

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Same contract as upstream, with only packed layouts if groups have different page sizes."""
        layouts: list[str] = super().get_supported_kv_cache_layouts()
        return [layout.name for layout in self._packed_layouts()] if self._is_packed else layouts

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Same contract as upstream; also splits mixed layers, makes compactors and adapts the runner."""
        kv_cache_config = with_zeroed_blocks(with_own_layers(kv_cache_config))
        # Not earlier: to measure memory, vLLM captures graphs on caches of whole layers.
        for name in mixed([name for group in kv_cache_config.kv_cache_groups for name in group.layer_names]):
            heads = self._heads(name)
            classes = classes_of(self.settings, extract_layer_index(name), heads)
            compressed, full = ([heads.index(head) for head in of_class] for of_class in classes)
            split_attention(self._layers, name, compressed, full, self.device)
        lenders = {name: getattr(layer, "kv_sharing_target_layer_name", None) for name, layer in self._layers.items()}
        borrowing = {name: lender for name, lender in lenders.items() if lender is not None}
        super().initialize_from_config(with_borrowed_specs(kv_cache_config, borrowing))
        layers = {
            group_id: [self._layer(name, spec) for name, spec in group_layer_specs(group).items()]
            for group_id, group in enumerate(kv_cache_config.kv_cache_groups)
            if isinstance(group_spec(group), CompressedLayerSpec)
        }
        self._compressed_group_ids = tuple(layers)
        self._compactors = self._make_compactors(alike(layers))
        self._clock = self._make_clock()
        self._runner = self._adapt_runner(self._compressed_group_ids)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Compacts, then runs the step.

        This is safe because the device works in order: the previous step has written the source blocks, and requests
        that got freed blocks write to them after the compaction.
        """
        orders = orders_of(scheduler_output)
        if orders:
            with self._clock.measure():
                for compactor in self._compactors:
                    compactor.compact(orders)
            if scheduler_output.kv_connector_metadata is not None:
                # From now on a KV connector may load into the freed blocks, without any order with the device's work.
                self._wait_for_device()
        self._runner.begin_step(
            Step(
                gone=(*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())),
                orders=orders,
                hits=compacted_hits_of(scheduler_output),
                num_scheduled=scheduler_output.num_scheduled_tokens,
            )
        )
        output = super().execute_model(scheduler_output)
        return None if output is None else self._with_seconds(output)  # None: `sample_tokens` returns the output

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Same contract as upstream; also puts times of compactions on the output, which the last pipeline rank has."""
        return self._with_seconds(super().sample_tokens(*args, **kwargs))

    def kv_cache_groups(self) -> list[dict[str, Any]]:
        """The KV-cache groups of this engine with this pipeline rank's layers, for `collective_rpc`."""
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
        """The capacity of this engine's KV cache, for `collective_rpc`; `Capacity.from_plain` reads it."""
        return capacity_of(self.model_runner.kv_cache_config, self.vllm_config).as_plain()

    def num_evicted(self) -> dict[str, int]:
        """Ids of compacted requests to evicted tokens, for `collective_rpc`."""
        return self._runner.counts.by_request()

    def _with_seconds(self, output: Any) -> Any:
        """A step's output with the times of compactions since the last one, if any; `None` stays `None`."""
        seconds = self._clock.take()
        if output is None or not seconds:
            return output
        return (
            TimedOutput(output, seconds)
            if isinstance(output, AsyncModelRunnerOutput)
            else with_seconds(output, seconds)
        )

    def _bind(self, layers: Sequence[Layer], device: torch.device) -> Scorers:
        """Scorers bound to the heads of these layers."""
        numbers, of_layers = tuple(layer.number for layer in layers), tuple(layer.heads for layer in layers)
        heads = Heads(numbers, of_layers, self._num_heads_of_model, device)
        return bind(heads, self._weights, self.settings.scorers)

    def _layer(self, name: str, spec: CompressedLayerSpec) -> Layer:
        number = extract_layer_index(name)
        heads = classes_of(self.settings, number, self._heads(name)).compressed
        return Layer(number, heads, self._layers[name], spec)

    def _heads(self, name: str) -> range:
        """This rank's KV heads of a layer, by their index in the model."""
        rank, num_heads = get_tensor_model_parallel_rank(), self._layers[name].num_kv_heads
        heads = heads_of_rank(self._num_heads_of_model, rank, self._degree)
        # In some models the number of heads differs between layers.
        return heads if len(heads) == num_heads else range(rank * num_heads, (rank + 1) * num_heads)

    @property
    def _num_heads_of_model(self) -> int:
        num_heads: int = self.vllm_config.model_config.get_total_num_kv_heads()
        return num_heads

    @property
    def _degree(self) -> int:
        degree: int = self.vllm_config.parallel_config.tensor_parallel_size
        return degree

    @property
    def _layers(self) -> dict[str, Any]:
        layers: dict[str, Any] = self.vllm_config.compilation_config.static_forward_context
        return layers

    def _geometry(self) -> Geometry | None:
        """Strides and sizes that this device's attention kernels require of packed blocks; `None` for any."""
        return None

    def _packed_layouts(self) -> list[KVCacheLayout]:
        """Block-outermost layouts that this device's attention kernels can read, best first."""
        raise NotImplementedError

    def _make_compactors(self, layers: AlikeLayers) -> Sequence[Compactor]:
        """Makes the compactors of these layers, one for each entry."""
        raise NotImplementedError

    def _wait_for_device(self) -> None:
        """Returns when all launched work has finished."""
        raise NotImplementedError

    def _make_clock(self) -> Clock:
        """Makes the clock that measures compactions."""
        raise NotImplementedError

    def _adapt_runner(self, group_ids: Sequence[int]) -> Runner:
        """Adapts vLLM's runner: physical slots and lengths in the compressed groups."""
        raise NotImplementedError


def of_pipeline_ranks(specs: dict[str, KVCacheSpec]) -> tuple[int, list[dict[str, KVCacheSpec]]]:
    """Exchanges specs between pipeline ranks; every rank must call this.

    Args:
        specs: Layer names to specs of this rank's layers.

    Returns:
        This rank's index, and the specs of all ranks in order.
    """
    group = get_pp_group()
    found = [specs] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(found, specs, group=group.cpu_group)
    return group.rank_in_group, found


class TimedOutput(AsyncModelRunnerOutput):
    """The output of a step in flight, to which times of compactions are added."""

    def __init__(self, output: AsyncModelRunnerOutput, seconds: list[float]) -> None:
        self._output = output
        self._seconds = seconds

    def get_output(self) -> Any:
        """Same contract as upstream: waits for the output."""
        return with_seconds(self._output.get_output(), self._seconds)

    def get_kv_connector_output(self) -> Any:
        """Same contract as upstream, new in 0.33: the KV connector's output of a failed step."""
        return self._output.get_kv_connector_output()


def choose_mamba_kernel(specs: Mapping[str, KVCacheSpec], vllm_config: Any) -> None:
    """Makes vLLM choose its kernel for Mamba layers, if there are any.

    vLLM's own call looks only at groups of a single spec, and misses packed groups, whose specs are wrapped.

    Args:
        specs: Layer names to specs.
        vllm_config: vLLM's configuration.
    """
    groups = [KVCacheGroupSpec([name], spec) for name, spec in specs.items()]
    initialize_mamba_ssu_backend(vllm_config.mamba_config, KVCacheConfig(0, [], groups))


def alike(layers: Mapping[int, Sequence[Layer]]) -> list[tuple[int, list[Layer]]]:
    """Divides layers among compactors: one for each group, or several if the layers' heads differ.

    Args:
        layers: Ids of compressed KV-cache groups to their layers.

    Returns:
        The group's id and the layers, for each compactor.
    """
    found: dict[tuple[Any, ...], list[Layer]] = {}
    for group_id, group in layers.items():
        for layer in group:
            head = layer.attention.kv_cache[:, 0]
            like = (group_id, layer.spec.head_size, key_dtype(layer.spec), head.dtype, head.shape, head.stride())
            found.setdefault(like, []).append(layer)
    return [(group_id, group) for (group_id, *_), group in found.items()]


def advise_on_waste(specs: Mapping[str, KVCacheSpec]) -> None:
    """Logs a warning if the number of full heads wastes much of the pool."""
    full, compressed = (
        sum(spec.num_kv_heads for spec in specs.values() if isinstance(spec, of_class))
        for of_class in (FullLayerSpec, CompressedLayerSpec)
    )
    if sentence := advice(full, full + compressed):
        logger.warning(sentence)


def check_attention(name: str, layer: Any, backends: Sequence[str]) -> None:
    """Rejects attention whose results would be wrong after a compaction.

    Models may define their own layer class, or give vLLM's layer their own backend under the name of one of vLLM's.

    Args:
        name: Name of the layer.
        layer: vLLM's attention layer.
        backends: Names of the supported backends.

    Raises:
        ValueError: Layer class or backend is not supported, or the layer uses ALiBi.
    """
    backend = layer.get_attn_backend()
    if backend.get_name() not in backends:
        raise ValueError(
            f"Layer {name} uses the attention backend {backend.get_name()}, which is not tested with compaction; set "
            f"--attention-backend {' or '.join(backends)}."
        )
    if type(layer) is not Attention or backend is not AttentionBackendEnum[backend.get_name()].get_class():
        raise ValueError(
            f"Layer {name} uses attention of its own ({type(layer).__name__} with {backend.__name__}), which may take "
            "slots for positions after a compaction; serve this model with stock vLLM."
        )
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        raise ValueError(
            f"Layer {name} uses ALiBi, whose biases would follow slots instead of positions; serve this model with "
            "stock vLLM."
        )


def check_block_size(name: str, backend: Any, spec: AttentionSpec) -> None:
    """Rejects blocks that vLLM would divide into smaller ones for its kernels, since orders name whole blocks.

    Args:
        name: Name of the layer, or of its full heads.
        backend: The layer's attention backend.
        spec: Spec of the cache.

    Raises:
        ValueError: The backend does not support this block size.
    """
    sizes = backend.get_supported_kernel_block_sizes(spec)
    if all(isinstance(size, int) for size in sizes) and spec.block_size not in sizes:
        raise ValueError(
            f"Layer {name} needs blocks of {spec.block_size} tokens, but the attention backend {backend.get_name()} "
            f"supports only {', '.join(map(str, sizes))}; set --block-size {max(sizes)} and --kv-full-layers "
            '"", or another --attention-backend.'
        )
