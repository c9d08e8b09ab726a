"""Classes of KV heads as vLLM sees them: KV-cache specs, and the block sizes that let them share one pool.

Full heads need a slot for every token, compressed ones only for the kept ones, so they need two block tables. vLLM has
that as KV-cache groups of layers; in a block-outermost layout it packs groups of different page sizes into one pool.
A block is the same bytes for every group: `[28 layers x 32 tokens]` or `[2 layers x 448 tokens]`, with as many heads in
each layer as are of the class. A layer with heads of both classes is two layers to vLLM.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVQuantMode,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    replace_as,
)

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.capacity import Capacity, GroupCapacity
from vllm_l2kv.kv_heads import check_full, classes_of, heads_of_rank
from vllm_l2kv.policy import CompactionPoints
from vllm_l2kv.settings import Settings

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KNOWN_FIELDS = frozenset(
    {
        *("block_size", "block_stride_alignment", "page_size_padded"),
        *("num_kv_heads", "head_size", "head_size_v", "dtype", "kv_quant_mode"),
        *("sliding_window", "attention_chunk_size", "non_causal"),
        *("dcp_sharded", "max_tp_shards", "is_draft"),
    }
)
"""Fields of a full-attention spec that are checked here, or that say nothing of what a row holds. Where another one is
set, a row is no key with its value: vLLM may add such fields in any version."""


@dataclass(frozen=True)
class Geometry:
    """What an attention kernel needs of blocks that hold several layers.

    Attributes:
        page: Bytes that each layer should have in a block, at least; smaller blocks are joined, two and two.
        unit: Bytes in which the stride between blocks is counted.
        factors: What the stride in units must not be divisible by.
    """

    page: int
    unit: int = 32 * 1024
    factors: tuple[int, ...] = (5, 47)

    def padded(self, stride: int) -> int:
        """The smallest stride, at least this one, at which blocks spread over the whole memory."""
        units = -(-stride // self.unit)
        while any(units % factor == 0 for factor in self.factors):
            units += 1
        return units * self.unit


FLASH_ATTENTION = Geometry(page=32 * 1024)
"""Measured with FlashAttention 3 by `benchmarks/speed/attention.py`; tables in `docs/benchmarks.md`.

One layer's blocks lie a stride apart. How a GPU spreads addresses over its memory has a modulus that is no power of
two, and where it divides the stride, all blocks of a layer fall into one part of the memory: decode attention takes up
to 23 % longer at multiples of 5 on an H100 (80 GB) and up to 40 % at multiples of 47 on an H200 (141 GB). 4 KiB more
are enough to spread them; at multiples of 32 KiB the last half percent goes too. Layers with less than 32 KiB in a
block lose 3 % to short reads."""


@dataclass(frozen=True, kw_only=True)
class _OneClassSpec(FullAttentionSpec):
    """A spec that vLLM groups only with its own class; else full and compressed heads would share a group."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merges specs of this very class.

        Raises:
            AssertionError: Classes are mixed; vLLM takes that as "not mergeable".
        """
        assert all(type(spec) is cls for spec in specs), "full and compressed heads cannot share a KV-cache group"
        return super().merge(specs)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether every spec is of this very class."""
        return all(type(spec) is type(self) for spec in kv_cache_specs.values())


@dataclass(frozen=True, kw_only=True)
class CompressedLayerSpec(_OneClassSpec):
    """Heads of a full-attention layer whose cache is compacted.

    Attributes:
        compressed_bytes: Bytes of a token in all such heads of the model, on one tensor-parallel rank. vLLM tells its
            scheduler of one layer in each group, on the first pipeline rank.
        full_bytes: The same in all full heads.
    """

    compressed_bytes: int = 0
    full_bytes: int = 0

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Same contract as `_OneClassSpec`; vLLM's takes over the fields that it knows."""
        first = specs[0]
        return replace(super().merge(specs), compressed_bytes=first.compressed_bytes, full_bytes=first.full_bytes)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Same contract as upstream; a default budget bounds what the longest request holds."""
        whole: int = super().max_memory_usage_bytes(vllm_config)
        settings, longest = Settings.from_config(vllm_config.additional_config), vllm_config.model_config.max_model_len
        rows = CompactionPoints(longest, settings.defaults, settings.intervals).max_rows(longest)
        return min(whole, num_blocks_for(rows, self.block_size) * self.page_size_bytes)


@dataclass(frozen=True, kw_only=True)
class FullLayerSpec(_OneClassSpec):
    """Heads of a full-attention layer whose cache is never compacted, beside compressed ones."""


def full_name(name: str) -> str:
    """What vLLM calls the full heads of a layer whose other heads compact; those keep the layer's own name."""
    return f"{name}.full"


def layer_name(name: str) -> str:
    """The layer's own name, of that or of its `full_name`."""
    return name.removesuffix(full_name(""))


def mixed(names: Collection[str]) -> list[str]:
    """Those of `names` whose layers have heads of both classes."""
    return [name for name in names if full_name(name) in names]


@dataclass(frozen=True, kw_only=True)
class SlidingLayerSpec(SlidingWindowSpec):
    """A layer that attends to a window of the last tokens and holds no more of them; it never compacts."""


@dataclass(frozen=True, kw_only=True)
class ChunkedLayerSpec(ChunkedLocalAttentionSpec):
    """A layer that attends to the chunk that a token lies in and holds no more; it never compacts."""


@dataclass(frozen=True, kw_only=True)
class RecurrentLayerSpec(MambaSpec):
    """A layer that keeps a state in place of rows (Mamba, gated delta net, short convolution); it never compacts."""


def classify_ranks(
    ranks: Sequence[Mapping[str, KVCacheSpec]],
    settings: Settings,
    geometry: Geometry | None = None,
    num_heads: int | None = None,
    degree: int = 1,
    drafts: Collection[str] = (),
) -> list[dict[str, KVCacheSpec]]:
    """Turns a model's full-attention specs into compressed and full ones.

    Layers that attend to a window or a chunk hold no more already. Recurrent layers hold a state, without rows. All of
    these get a class of their own and stay as they are. Layers of a draft model are full, whatever their numbers: what
    drafts finds its slots and lengths without us, by positions.

    Args:
        ranks: Of each pipeline rank, layer names to the specs that vLLM found, of any tensor-parallel rank.
        settings: Which layers and heads stay full.
        geometry: What the attention kernel wants of packed blocks; `None` if it reads any stride equally fast.
        num_heads: KV heads of a layer in the model; `None` if the specs are not of a rank, and say it themselves.
        degree: Tensor-parallel size.
        drafts: Names of layers that draft for the others.

    Returns:
        Of each pipeline rank, layer names to specs, those of drafts first: vLLM's runner V1 drafts with the block
        tables of the first group. The others are in the same order. A layer with heads of both classes has its own
        name, for those that compact, and `full_name`.

    Raises:
        ValueError: A layer whose cache we cannot compact, full layers or heads that the model does not have or ranks
            hold in different numbers, or nothing left to compact.
    """
    drafting = {name: spec for rank in ranks for name, spec in rank.items() if name in drafts}
    specs = {name: spec for rank in ranks for name, spec in rank.items() if name not in drafts}
    _check_specs(specs)
    settings = _of_attending_layers(settings, specs)
    num_heads = num_heads or max(spec.num_kv_heads for spec in specs.values() if isinstance(spec, AttentionSpec))
    check_full(settings, [extract_layer_index(name) for name in specs], num_heads, degree)
    heads = heads_of_rank(num_heads, 0, degree)
    of_drafts = _of_drafts(drafting)
    classified: list[dict[str, KVCacheSpec]] = [
        {name: spec for name, spec in of_drafts.items() if name in rank} for rank in ranks
    ]
    for found, rank in zip(classified, ranks, strict=True):
        for name, spec in rank.items():
            if name not in drafting:
                found |= _classified(name, spec, settings, heads)
    of_class = {each: _of_class(each, classified) for each in (FullLayerSpec, CompressedLayerSpec)}
    full, compressed = of_class.values()
    if not any(compressed):
        if not any(isinstance(spec, FullAttentionSpec) for spec in specs.values()):
            raise ValueError(
                "No layer of this model attends to all tokens before it, so there is nothing to compress; serve it "
                "with stock vLLM."
            )
        raise ValueError("No full-attention layer is left to compress; name fewer layers in --kv-full-layers.")
    changes: dict[type, dict[str, Any]] = {each: {} for each in of_class}
    if any(full):
        smaller, larger = sorted(of_class, key=lambda each: _most_bytes(of_class[each]))
        sizes = pack(of_class[smaller], of_class[larger], geometry)
        changes[smaller]["block_size"], changes[larger]["block_size"] = sizes.smaller, sizes.larger
        sized = (replace(spec, **changes[each]) for each in of_class for rank in of_class[each] for spec in rank)
        if is_packed(sized):  # vLLM would apply a stride to each layer otherwise
            for each in changes.values():
                each["block_stride_alignment"] = sizes.stride
    changes[CompressedLayerSpec] |= {"compressed_bytes": token_bytes(compressed), "full_bytes": token_bytes(full)}
    return [
        {name: replace(spec, **changes.get(type(spec), {})) for name, spec in found.items()} for found in classified
    ]


def _of_drafts(specs: Mapping[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """Specs of layers that draft.

    Raises:
        ValueError: A layer with another cache than keys and values of all tokens before it.
    """
    for name, spec in specs.items():
        if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size or spec.non_causal:
            raise ValueError(
                f"Layer {name} of the draft model does not attend to all tokens before it; drop --speculative-config, "
                "or name a draft model with full attention alone."
            )
    return {name: replace_as(spec, FullLayerSpec) for name, spec in specs.items()}


def _of_class(spec_class: type[AttentionSpec], ranks: Iterable[Mapping[str, KVCacheSpec]]) -> list[list[AttentionSpec]]:
    """Specs of this class on each rank."""
    return [[spec for spec in rank.values() if type(spec) is spec_class] for rank in ranks]


def token_bytes(ranks: Iterable[Iterable[KVCacheSpec]]) -> int:
    """Bytes of a token in all these layers."""
    return sum(spec.page_size_bytes // spec.block_size for rank in ranks for spec in rank)


def _of_attending_layers(settings: Settings, specs: Mapping[str, KVCacheSpec]) -> Settings:
    """The settings with full layers that have keys.

    A model with recurrent layers attends in a few only. A named layer without keys stands there for the next one that
    has some: the default of 0 and 1 is the first attention layer.

    Raises:
        ValueError: A named layer comes after all that have keys.
    """
    attending = {extract_layer_index(name) for name, spec in specs.items() if not isinstance(spec, MambaSpec)}
    if all(not isinstance(spec, MambaSpec) for spec in specs.values()):
        return settings
    last = max(attending, default=-1)
    if settings.full_layers and settings.full_layers[-1] > last:
        raise ValueError(
            f"full_layers names layer {settings.full_layers[-1]}, but the last attention layer of this model is "
            f"{last}; change --kv-full-layers."
        )
    following = (min(index for index in attending if index >= layer) for layer in settings.full_layers)
    return replace(settings, full_layers=tuple(following))


def _classified(name: str, spec: KVCacheSpec, settings: Settings, heads: range) -> dict[str, KVCacheSpec]:
    """One layer's names and specs; `heads` are those that one rank holds of a layer like most."""
    layer = extract_layer_index(name)
    if isinstance(spec, MambaSpec):
        if layer in settings.full_heads:
            raise ValueError(f"full_heads names layer {layer}, which has no KV heads; change --kv-full-heads.")
        return {name: replace_as(spec, RecurrentLayerSpec)}
    if isinstance(spec, SlidingWindowSpec):
        return {name: replace_as(spec, SlidingLayerSpec)}
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return {name: replace_as(spec, ChunkedLayerSpec)}
    if not isinstance(spec, FullAttentionSpec):
        return {name: spec}
    if spec.num_kv_heads != len(heads):
        if layer in settings.full_heads:
            raise ValueError(
                f"full_heads names KV heads of layer {layer}, which has another number of them than the model says; "
                "change --kv-full-heads."
            )
        heads = range(spec.num_kv_heads)
    compressed, full = map(len, classes_of(settings, layer, heads))
    if not full:
        return {name: replace_as(spec, CompressedLayerSpec)}
    if not compressed:
        return {name: replace_as(spec, FullLayerSpec)}
    return {
        name: replace_as(spec, CompressedLayerSpec, num_kv_heads=compressed),
        full_name(name): replace_as(spec, FullLayerSpec, num_kv_heads=full),
    }


def _most_bytes(ranks: Iterable[Iterable[AttentionSpec]]) -> int:
    """Bytes of a block on the rank with most of them."""
    return max(sum(spec.page_size_bytes for spec in rank) for rank in ranks)


class PackedSizes(NamedTuple):
    """Block sizes of the two classes of heads, and the stride between blocks.

    Attributes:
        smaller: Tokens in a block of the class with fewer bytes of a token.
        larger: Tokens in a block of the other class.
        stride: Bytes between blocks, or `None` for no padding.
    """

    smaller: int
    larger: int
    stride: int | None


def pack(
    smaller: Sequence[Sequence[AttentionSpec]], larger: Sequence[Sequence[AttentionSpec]], geometry: Geometry | None
) -> PackedSizes:
    """Block sizes at which a block weighs about the same in both classes.

    The smaller class has few heads, so its blocks hold more tokens. Their number is a multiple of the other class's:
    every kernel that takes the one takes the other, block hashes stay at the finer granularity, and the least common
    multiple, at which prefix-cache hits of a two-group model land, is no larger than need be. What the division leaves
    over is lost (`kv_heads.waste`).

    Pipeline ranks have as many blocks as the one with the heaviest can hold. So a class counts by the rank that has
    most of it, and blocks of the other ranks may be lighter.

    Args:
        smaller: On each pipeline rank, specs of the class with fewer bytes of a token, all of one block size.
        larger: Specs of the other class, of the same block size.
        geometry: What the attention kernel wants, or `None`.
    """
    small, large = ([spec for rank in ranks for spec in rank] for ranks in (smaller, larger))
    block_size, times = large[0].block_size, _most_bytes(larger) // _most_bytes(smaller)
    page = min(*(times * spec.page_size_bytes for spec in small), *(spec.page_size_bytes for spec in large))
    factor = 1
    while geometry is not None and factor * page < geometry.page:
        factor *= 2
    return PackedSizes(
        smaller=factor * block_size * times,
        larger=factor * block_size,
        stride=geometry.padded(factor * _most_bytes(larger)) if geometry else None,
    )


def is_packed(specs: Iterable[KVCacheSpec]) -> bool:
    """Whether layers of different page sizes must share one pool, for which vLLM needs a block-outermost layout."""
    return len({spec.page_size_bytes for spec in specs}) > 1


def key_dtype(spec: AttentionSpec) -> torch.dtype | None:
    """What the elements of a cached key are, or `None` for a cache that cannot be scored.

    A spec says that a cache is fp8 with a scale per layer, not which fp8: `check_supported` refuses e5m2.
    """
    if spec.kv_quant_mode == KVQuantMode.FP8_PER_TENSOR:
        return torch.float8_e4m3fn
    return spec.dtype if spec.kv_quant_mode == KVQuantMode.NONE and spec.dtype in FLOAT_DTYPES else None


def _check_specs(specs: Mapping[str, KVCacheSpec]) -> None:
    for name, spec in specs.items():
        if type(spec) in (SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec):
            continue
        # Exact class: subclasses (MLA, sinks, R-SWA, hidden states) store something else than plain keys and values.
        if type(spec) is not FullAttentionSpec:
            raise ValueError(
                f"Layer {name} caches {type(spec).__name__}, which cannot be compressed; "
                "serve this model with stock vLLM."
            )
        if spec.sliding_window is not None or spec.attention_chunk_size is not None:
            raise ValueError(
                f"Layer {name} attends to a window but caches every token; leave vLLM's hybrid KV-cache manager on "
                "(no --disable-hybrid-kv-cache-manager) or serve this model with stock vLLM."
            )
        if spec.non_causal:
            raise ValueError(f"Layer {name} attends non-causally; serve this model with stock vLLM.")
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"Layer {name} has keys of {spec.head_size} elements and values of {spec.head_size_v}; serve this "
                "model with stock vLLM."
            )
        for field in fields(spec):
            if field.name not in KNOWN_FIELDS and getattr(spec, field.name) != field.default:
                raise ValueError(
                    f"Layer {name} caches rows in a way of its own ({field.name}={getattr(spec, field.name)}); serve "
                    "this model with stock vLLM."
                )
        if key_dtype(spec) is None:
            raise ValueError(
                f"Layer {name} caches {spec.dtype} quantized as {spec.kv_quant_mode.name}; set --kv-cache-dtype to "
                "auto or fp8_e4m3."
            )


def group_layer_specs(group: KVCacheGroupSpec) -> dict[str, KVCacheSpec]:
    """Each layer's own spec in a group; vLLM wraps packed groups in one spec for all their layers.

    Layers that share another layer's cache have no spec and are left out; so are those of other pipeline ranks, whose
    specs vLLM leaves where a rank has none of a group's layers.
    """
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return {name: spec.kv_cache_specs[name] for name in group.layer_names if name in spec.kv_cache_specs}
    return dict.fromkeys(group.layer_names, spec)


def group_spec(group: KVCacheGroupSpec) -> KVCacheSpec:
    """The spec of one of a group's layers, on this pipeline rank or another; they are of one class."""
    spec = group.kv_cache_spec
    return next(iter(spec.kv_cache_specs.values())) if isinstance(spec, UniformTypeKVCacheSpecs) else spec


def group_window(group: KVCacheGroupSpec) -> int | None:
    """Tokens that a layer of this group attends to at most; `None` if it has no sliding window.

    vLLM puts layers of different windows into different groups.
    """
    spec = group_spec(group)
    return spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None


def with_own_layers(kv_cache_config: KVCacheConfig) -> KVCacheConfig:
    """A rank's part of vLLM's plan, without places for layers that it does not have.

    vLLM plans such places where a packed group has layers on other pipeline ranks only, and then fails to make them.
    """
    own = {name for group in kv_cache_config.kv_cache_groups for name in group.layer_names}
    places = [place for place in kv_cache_config.kv_cache_tensors if own.issuperset(place.layers)]
    return replace(kv_cache_config, kv_cache_tensors=places)


@dataclass
class ZeroingCacheConfig(KVCacheConfig):
    """vLLM's plan, with blocks zeroed when they are handed out."""

    @property
    def needs_kv_cache_zeroing(self) -> bool:
        """Same contract as upstream: always."""
        return True


def with_zeroed_blocks(kv_cache_config: KVCacheConfig) -> KVCacheConfig:
    """The same plan, by which vLLM zeroes new blocks on GPUs; for the scheduler and the worker alike.

    Where a block holds a multiple of FlashAttention 3's tile, it loads whole tiles of a prompt (`get_pagedkv_tma`), and
    multiplies values after the prompt's end by zero. If an earlier request left NaN there, the result is NaN. Blocks of
    stock vLLM hold 16 tokens, which no tile divides; those of full layers hold many more. A compaction zeroes what it
    leaves empty.
    """
    if current_platform.is_cpu():
        return kv_cache_config
    return ZeroingCacheConfig(**{field.name: getattr(kv_cache_config, field.name) for field in fields(kv_cache_config)})


def with_borrowed_specs(kv_cache_config: KVCacheConfig, lenders: Mapping[str, str]) -> KVCacheConfig:
    """The same plan, with specs in packed groups for layers that read another layer's cache.

    vLLM adds such layers to the groups of their lenders, and fails where it then finds no spec for them.

    Args:
        kv_cache_config: vLLM's plan for this rank.
        lenders: Names of layers without a cache of their own to those of the layers whose caches they read.
    """
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            specs = spec.kv_cache_specs
            borrowed = {name: specs[lender] for name, lender in lenders.items() if lender in specs}
            group = replace(group, kv_cache_spec=replace(spec, kv_cache_specs={**specs, **borrowed}))
        groups.append(group)
    return replace(kv_cache_config, kv_cache_groups=groups)


def capacity_of(kv_cache_config: Any, vllm_config: Any) -> Capacity:
    """What requests may hold of an engine's KV cache.

    Args:
        kv_cache_config: vLLM's, with blocks and groups.
        vllm_config: vLLM's configuration.
    """
    max_model_len = vllm_config.model_config.max_model_len
    specs = [group_spec(group) for group in kv_cache_config.kv_cache_groups]
    compressed = next(spec for spec in specs if isinstance(spec, CompressedLayerSpec))
    # Those of each step under way, which the model may still reject, and those that a draft model writes ahead.
    num_steps, num_tokens = vllm_config.max_concurrent_batches, vllm_config.scheduler_config.max_num_batched_tokens
    num_drafts = num_steps * vllm_config.num_speculative_tokens
    return Capacity(
        num_blocks=kv_cache_config.num_blocks - 1,  # one is vLLM's null block
        groups=tuple(group_capacity(spec, num_steps, num_tokens, max_model_len) for spec in specs),
        max_model_len=max_model_len,
        num_drafts=num_drafts + vllm_config.num_lookahead_tokens,
        compressed_bytes=compressed.compressed_bytes,
        full_bytes=compressed.full_bytes,
    )


def group_capacity(spec: KVCacheSpec, num_steps: int, num_tokens: int, max_model_len: int) -> GroupCapacity:
    """What a KV-cache group needs of a request.

    Args:
        spec: Of one of its layers, which are of one class.
        num_steps: Steps under way at once.
        num_tokens: Tokens of a request in a step.
        max_model_len: Tokens of the longest request.
    """
    max_blocks = None
    if isinstance(spec, (SlidingWindowSpec, ChunkedLocalAttentionSpec)):
        max_blocks = spec.max_admission_blocks_per_request(num_steps * num_tokens, max_model_len)
    elif isinstance(spec, MambaSpec):
        max_blocks = _blocks_of_states(spec, num_steps)
    return GroupCapacity(spec.block_size, isinstance(spec, CompressedLayerSpec), max_blocks)


def _blocks_of_states(spec: MambaSpec, num_steps: int) -> int:
    """Blocks that a request holds at most; where states are cached, those of all steps under way and the one before.

    vLLM counts one step under way, and would preempt a request that just fits again and again.
    """
    if spec.mamba_cache_mode == "none":
        return 1 + spec.num_speculative_blocks
    return 1 + num_steps + spec.num_speculative_blocks + spec.num_prefill_checkpoint_blocks
