"""Attention of a mixed layer with FlashAttention 3, without copies of queries, keys, values and outputs.

A batch in which every request decodes one token takes one call for both classes of heads. Every (request, KV head) is a
sequence with its own pages (`kernels.head_pages`): `starts` gives each sequence's place, and `seqused_q` limits
FlashAttention to one query there. Other batches take a call for each run of adjacent heads of a class. All kernels are
launched while the model runs, so CUDA graphs of the model contain them, and nothing needs to run before a replay.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import torch
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends import fa_utils
from vllm.v1.kv_cache_interface import is_quantized_kv_cache
from vllm.v1.worker.utils import AttentionGroup

from vllm_l2kv.kernels.head_pages import HeadPages, Held, Sequences
from vllm_l2kv.kv_cache_spec import full_name
from vllm_l2kv.worker.heads import HeadClass, with_heads

MOST_BYTES = 256 << 20
"""Bytes for the sequences of a layer; batches with more requests than fit take calls for runs."""
MAX_NUM_SPLITS = 32
"""Most splits of a sequence, where vLLM lets FlashAttention choose: since it would choose for a single head, it would
reserve memory for four times as many."""

ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(["q", "k", "v", "k_new", "v_new", "q_v", "out", "cu_seqlens_q", "cu_seqlens_k"]),
    **dict.fromkeys(["cu_seqlens_k_new", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "page_table"]),
    **dict.fromkeys(["kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary"]),
    **dict.fromkeys(["q_descale", "k_descale", "v_descale", "softmax_scale"]),
    **{"is_causal": True, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0},
    **{"is_rotary_interleaved": True, "scheduler_metadata": None, "num_splits": 0, "pack_gqa": None, "sm_margin": 0},
    **{"s_aux": None, "cp_world_size": 1, "cp_rank": 0, "cp_tot_seqused_k": None},
}
"""Arguments of FlashAttention's operator, which has no defaults. vLLM's wrapper of it does not pass `seqused_q`."""


@dataclass
class Room:
    """Device memory that all layers of an engine use in turn.

    Attributes:
        sequences: Sequences of the layer that is being computed.
        ones: `[num_sequences]` int32, all 1.
        ascending: `[num_sequences + 1]` int32, 0, 1, 2, ...
        schedules: Number of full heads in a layer to FlashAttention's schedule in this forward pass.
        holds: Attention and metadata of the layer whose sequences are held; `None` if there are none.
    """

    sequences: Sequences
    ones: torch.Tensor
    ascending: torch.Tensor
    schedules: dict[int, torch.Tensor] = field(default_factory=dict)
    holds: tuple[Any, Any] | None = None

    @classmethod
    def of(cls, num_sequences: int, max_num_pages: int, device: torch.device) -> "Room":
        """Allocates room for `num_sequences` sequences of up to `max_num_pages` pages each."""
        ones = torch.ones(num_sequences, dtype=torch.int32, device=device)
        ascending = torch.arange(num_sequences + 1, dtype=torch.int32, device=device)
        return cls(Sequences.of(num_sequences, max_num_pages, device), ones, ascending)

    def is_for(self, attention: Any, metadata: Any) -> bool:
        """Whether it holds the sequences of this layer in this step."""
        return self.holds is not None and self.holds[0] is attention and self.holds[1] is metadata


@dataclass(frozen=True)
class Kind:
    """Attention parameters of a layer.

    Attributes:
        scale: Softmax scale.
        softcap: Cap on the logits; 0 for none.
        is_first: Whether no earlier layer has the same number of full heads; this layer then makes their schedule.
    """

    scale: float
    softcap: float
    is_first: bool


def attend(
    pages: HeadPages,
    kind: Kind,
    room: Room,
    query: torch.Tensor,
    output: torch.Tensor,
    num_splits: int,
    longest: int,
    scales: Mapping[str, torch.Tensor],
) -> None:
    """Computes attention of one layer, after `HeadPages.write` has filled the room's sequences.

    Args:
        pages: The layer's pages.
        kind: The layer's parameters.
        room: The engine's room.
        query: `[num_requests, num_heads, head_size]`.
        output: Same shape, contiguous; written.
        num_splits: Most splits of a sequence; FlashAttention chooses their number by lengths on the device.
        longest: Most rows that a request holds.
        scales: `q_descale`, `k_descale` and `v_descale`, each of one element; empty for a cache that is not quantized.
    """
    num_sequences, head_size = query.shape[0] * pages.places.shape[0], query.shape[2]
    sequences = room.sequences.first(num_sequences)
    query, output = query.reshape(num_sequences, -1, head_size), output.view(num_sequences, -1, head_size)
    pool = pages.pool.view(query.dtype)
    if kind.is_first:
        room.schedules[pages.num_full] = fa_utils.get_scheduler_metadata(
            batch_size=num_sequences,
            max_seqlen_q=1,
            max_seqlen_k=longest,
            num_heads_q=query.shape[1],
            num_heads_kv=1,
            headdim=head_size,
            cache_seqlens=sequences.lengths,
            qkv_dtype=query.dtype,
            cu_seqlens_q=room.ascending[: num_sequences + 1],
            page_size=pages.page_size,
            causal=True,
            num_splits=num_splits,
        )
    named: dict[str, Any] = {
        **ARGUMENTS,
        "q": query,
        "k": pool[..., :head_size],
        "v": pool[..., head_size:],
        "out": output,
        "cu_seqlens_q": sequences.starts,
        "seqused_q": room.ones[:num_sequences],
        "seqused_k": sequences.lengths,
        "max_seqlen_q": 1,
        "max_seqlen_k": longest,
        "page_table": sequences.pages,
        **{name: scale.expand(num_sequences, 1) for name, scale in scales.items()},
        "softmax_scale": kind.scale,
        "softcap": kind.softcap,
        "scheduler_metadata": room.schedules[pages.num_full],
        "num_splits": num_splits,
    }
    torch.ops._vllm_fa3_C.fwd(**named)


@dataclass(frozen=True)
class Run:
    """Adjacent KV heads of one class, which are slices of a layer's states and of the class's cache.

    Attributes:
        name: vLLM's name of the class's cache.
        kv: The KV heads, among those of the layer.
        queries: Their query heads.
        cached: The KV heads, among those of the class.
        impl: A copy of vLLM's implementation with the run's number of heads.
    """

    name: str
    kv: slice
    queries: slice
    cached: slice
    impl: Any


def runs_of(heads: HeadClass) -> list[Run]:
    """Returns the runs of a class, in ascending order."""
    kv_heads = heads.kv_heads
    group = heads.impl.num_heads // heads.impl.num_kv_heads
    starts = [i for i, head in enumerate(kv_heads) if i == 0 or head != kv_heads[i - 1] + 1]
    runs = []
    for start, end in pairwise([*starts, len(kv_heads)]):
        first, number = kv_heads[start], end - start
        kv, queries = slice(first, first + number), slice(first * group, (first + number) * group)
        runs.append(Run(heads.name, kv, queries, slice(start, end), with_heads(heads.impl, number)))
    return runs


class AttentionByHead:
    """Wraps a layer's `SplitAttention`, which still serves other calls.

    Args:
        split: The layer's `SplitAttention`.
        name: vLLM's name of the layer.
        pages: The layer's pages.
        room: The engine's room.
        is_first: See `Kind`.
    """

    def __init__(self, split: Any, name: str, pages: HeadPages, room: Room, is_first: bool) -> None:
        self._split = split
        self._names = full_name(name), name
        self._runs = [run for of_class in split.classes for run in runs_of(of_class)]
        self._pages = pages
        self._room = room
        self._kind = Kind(split.scale, split.logits_soft_cap, is_first)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._split, name)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Same contract as upstream; also writes the layer's sequences if the batch uses one call."""
        contexts = {name: get_attention_context(name) for name in self._names}
        (full, _, _, full_slots), (compressed, _, _, slots) = contexts.values()
        num_requests = self._num_requests(compressed)
        if num_requests is None:
            for run in self._runs:
                _, _, cache, slots = contexts[run.name]
                run.impl.do_kv_cache_update(layer, key[:, run.kv], value[:, run.kv], cache[:, run.cached], slots)
            return
        self._pages.write(
            self._room.sequences,
            key[:num_requests],
            value[:num_requests],
            Held(full.block_table, full.seq_lens, full_slots),
            Held(compressed.block_table, compressed.seq_lens, slots),
            layer._k_scale,
            layer._v_scale,
        )
        self._room.holds = self, compressed

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Same contract as upstream."""
        if attn_metadata is None:  # vLLM's warm-up
            whole: torch.Tensor = self._split.forward(layer, query, key, value, kv_cache, attn_metadata, output)
            return whole
        # A piecewise CUDA graph may contain the cache update without this.
        if not self._room.is_for(self, attn_metadata):
            return self._forward_runs(layer, query, output)
        full, *_ = get_attention_context(self._names[0])
        num_requests = attn_metadata.seq_lens.shape[0]
        is_quantized = self._pages.pool.itemsize == 1
        scales = {"q_descale": layer._q_scale, "k_descale": layer._k_scale, "v_descale": layer._v_scale}
        attend(
            self._pages,
            self._kind,
            self._room,
            query[:num_requests],
            output[:num_requests],
            attn_metadata.max_num_splits or MAX_NUM_SPLITS,
            max(full.max_seq_len, attn_metadata.max_seq_len),
            scales if is_quantized else {},
        )
        return output

    def _forward_runs(self, layer: Any, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """A call for each run. Keys and values are already in the cache."""
        contexts = {name: get_attention_context(name) for name in self._names}
        for run in self._runs:
            metadata, _, cache, _ = contexts[run.name]
            own = query[:, run.queries], None, None, cache[:, run.cached], metadata, output[:, run.queries]
            run.impl.forward(layer, *own)
        return output

    def _num_requests(self, metadata: Any) -> int | None:
        """Number of requests, padding included, of a batch that uses one call; `None` for other batches."""
        if metadata is None or metadata.max_query_len != 1:
            return None
        num_requests: int = metadata.seq_lens.shape[0]
        most: int = self._room.ones.shape[0] // self._pages.places.shape[0]
        return num_requests if num_requests <= most else None


def leave_schedules_to_calls(groups: Iterable[Iterable[AttentionGroup]], names: set[str]) -> None:
    """Keeps vLLM from making a schedule for FlashAttention in each step, which would be for all heads of a class.

    Each call of these layers then makes its own schedule.

    Args:
        groups: The runner's attention groups.
        names: Names of the caches whose layers attend by head.
    """
    for group in chain(*groups):
        if names.issuperset(group.layer_names):
            for builder in group.metadata_builders:
                builder.aot_schedule = False


def takes_one_call(impl: Any) -> bool:
    """Whether vLLM's implementation of a layer's attention is FlashAttention 3 without parameters for each head.

    Args:
        impl: vLLM's implementation for all heads.
    """
    if getattr(impl, "vllm_flash_attn_version", None) != 3 or impl.batch_invariant_enabled or impl.dcp_world_size > 1:
        return False
    if impl.sinks is not None or impl.sliding_window != (-1, -1):
        return False
    schema = torch.ops._vllm_fa3_C.fwd.default._schema
    is_known = {argument.name for argument in schema.arguments} == ARGUMENTS.keys()
    return is_known and (not is_quantized_kv_cache(impl.kv_cache_dtype) or impl.supports_quant_query_input)


def room_bytes(num_sequences: int, max_num_pages: int) -> int:
    """Device memory of `Room.of`, in bytes."""
    return 4 * (num_sequences * (max_num_pages + 4) + 2)


def room_shape(num_kv_heads: int, max_num_requests: int, max_model_len: int, page_size: int) -> tuple[int, int]:
    """Arguments of `Room.of`: number of sequences, and most pages of each.

    Args:
        num_kv_heads: KV heads of a layer.
        max_num_requests: Most requests in a batch.
        max_model_len: Most tokens in a request.
        page_size: Tokens per page.
    """
    max_num_pages = -(-max_model_len // page_size)
    return min(max_num_requests, MOST_BYTES // (4 * max_num_pages * num_kv_heads)) * num_kv_heads, max_num_pages


def attend_by_head(layers: Mapping[str, Any], names: Iterable[str], room: Room) -> set[str]:
    """Lets layers attend by head if their blocks can be read as pages of one head.

    Args:
        layers: vLLM's layers by name, with their caches allocated.
        names: Names of the layers that were split.
        room: The engine's room.

    Returns:
        Names of the caches of these layers.
    """
    done: set[str] = set()
    counts: set[int] = set()
    for name in sorted(names, key=extract_layer_index):
        layer, split = layers[name], layers[name].impl
        compressed, full = (of_class.kv_heads for of_class in split.classes)
        pages = HeadPages.of(layers[full_name(name)].kv_cache, layer.kv_cache, full, compressed)
        if pages is None:
            continue
        layer.impl = AttentionByHead(split, name, pages, room, len(full) not in counts)
        counts.add(len(full))
        done |= {name, full_name(name)}
    return done
