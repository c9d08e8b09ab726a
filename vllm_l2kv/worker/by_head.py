"""Both classes of a layer's heads in one call of FlashAttention 3, where every request decodes one token.

Every (request, KV head) is a sequence with pages of its own (`kernels.head_pages`). Queries and outputs stay where they
are: a sequence names its own by `starts`, and FlashAttention reads and writes one of each, since `seqused_q` says so.
Everything is launched while the model runs, so that a CUDA graph of the model holds it, and nothing is left to be done
before a graph is replayed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends import fa_utils
from vllm.v1.kv_cache_interface import is_quantized_kv_cache
from vllm.v1.worker.utils import AttentionGroup

from vllm_l2kv.kernels.head_pages import HeadPages, Held, Sequences
from vllm_l2kv.kv_cache_spec import full_name

MOST_BYTES = 256 << 20
"""Memory for the table of a layer; batches of more requests than it holds take a call for each class."""
MAX_NUM_SPLITS = 32
"""Parts of a sequence that FlashAttention reads side by side, where vLLM lets it choose: by its own choice, made for
one head, it would reserve memory for four times as many."""

ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(["q", "k", "v", "k_new", "v_new", "q_v", "out", "cu_seqlens_q", "cu_seqlens_k"]),
    **dict.fromkeys(["cu_seqlens_k_new", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "page_table"]),
    **dict.fromkeys(["kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary"]),
    **dict.fromkeys(["q_descale", "k_descale", "v_descale", "softmax_scale"]),
    **{"is_causal": True, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0},
    **{"is_rotary_interleaved": True, "scheduler_metadata": None, "num_splits": 0, "pack_gqa": None, "sm_margin": 0},
    **{"s_aux": None, "cp_world_size": 1, "cp_rank": 0, "cp_tot_seqused_k": None},
}
"""Those of FlashAttention's operator, which has no defaults. vLLM's function for it does not pass `seqused_q` on."""


@dataclass
class Room:
    """Memory that the layers of an engine use in turn.

    Attributes:
        sequences: Of the layer that is being computed.
        ones: `[num_sequences]` int32.
        ascending: `[num_sequences + 1]` int32.
        schedules: Full heads of a layer to FlashAttention's schedule of this pass through the model.
        holds: Whose sequences they are: a layer's attention and its metadata.
    """

    sequences: Sequences
    ones: torch.Tensor
    ascending: torch.Tensor
    schedules: dict[int, torch.Tensor] = field(default_factory=dict)
    holds: tuple[Any, Any] | None = None

    @classmethod
    def of(cls, num_sequences: int, max_num_pages: int, device: torch.device) -> "Room":
        """For so many sequences, of so many pages at most."""
        ones = torch.ones(num_sequences, dtype=torch.int32, device=device)
        ascending = torch.arange(num_sequences + 1, dtype=torch.int32, device=device)
        return cls(Sequences.of(num_sequences, max_num_pages, device), ones, ascending)

    def is_for(self, attention: Any, metadata: Any) -> bool:
        """Whether it holds the sequences of this step of a layer."""
        return self.holds is not None and self.holds[0] is attention and self.holds[1] is metadata


@dataclass(frozen=True)
class Kind:
    """What a call must know of a layer.

    Attributes:
        scale: Of the products of queries and keys.
        softcap: Bound of them, or 0.
        is_first: Whether no earlier layer has as many full heads, so that this one makes the schedule for all of them.
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
    """Attention of one layer, after `HeadPages.write` into the room's sequences.

    Args:
        pages: The layer's.
        kind: The layer's.
        room: Of the engine.
        query: `[num_requests, num_heads, head_size]`.
        output: The same, contiguous; written.
        num_splits: Parts of a sequence at most; FlashAttention chooses how many, by lengths on the device.
        longest: Rows that a request holds at most.
        scales: `q_descale`, `k_descale` and `v_descale`, each one number; empty for a cache that is not quantized.
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


class DecodeByHead:
    """Takes the place of a layer's `SplitAttention`, which serves other batches and answers everything else.

    Args:
        split: The layer's.
        name: vLLM's name of the layer.
        pages: The layer's.
        room: Of the engine.
        is_first: As that of `Kind`.
    """

    def __init__(self, split: Any, name: str, pages: HeadPages, room: Room, is_first: bool) -> None:
        self._split = split
        self._names = full_name(name), name
        self._pages = pages
        self._room = room
        self._kind = Kind(split.scale, split.logits_soft_cap, is_first)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._split, name)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Same contract as upstream; also makes the layer's table, if the batch takes one call."""
        (full, _, _, full_slots), (compressed, _, _, slots) = (get_attention_context(name) for name in self._names)
        num_requests = self._num_requests(compressed)
        if num_requests is None:
            self._split.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
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
        # A piecewise graph may hold the cache's update and not this.
        if not self._room.is_for(self, attn_metadata):
            whole: torch.Tensor = self._split.forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
            return whole
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

    def _num_requests(self, metadata: Any) -> int | None:
        """Requests of a batch that takes one call, those that pad it included; `None` for another batch."""
        if metadata is None or metadata.max_query_len != 1:
            return None
        num_requests: int = metadata.seq_lens.shape[0]
        most: int = self._room.ones.shape[0] // self._pages.places.shape[0]
        return num_requests if num_requests <= most else None


def leave_schedules_to_calls(groups: Iterable[Iterable[AttentionGroup]], names: set[str]) -> None:
    """Keeps vLLM from making schedules in each step that only batches of another kind would use.

    Args:
        groups: The runner's.
        names: Of caches whose layers decode by head, which other calls of theirs then make for themselves.
    """
    for group in chain(*groups):
        if names.issuperset(group.layer_names):
            for builder in group.metadata_builders:
                builder.aot_schedule = False


def takes_one_call(impl: Any) -> bool:
    """Whether vLLM's implementation of a layer's attention is FlashAttention 3 with nothing that follows heads.

    Args:
        impl: vLLM's, for all heads.
    """
    if getattr(impl, "vllm_flash_attn_version", None) != 3 or impl.batch_invariant_enabled or impl.dcp_world_size > 1:
        return False
    if impl.sinks is not None or impl.sliding_window != (-1, -1):
        return False
    schema = torch.ops._vllm_fa3_C.fwd.default._schema
    is_known = {argument.name for argument in schema.arguments} == ARGUMENTS.keys()
    return is_known and (not is_quantized_kv_cache(impl.kv_cache_dtype) or impl.supports_quant_query_input)


def room_bytes(num_sequences: int, max_num_pages: int) -> int:
    """Bytes of `Room.of`."""
    return 4 * (num_sequences * (max_num_pages + 4) + 2)


def room_shape(num_kv_heads: int, max_num_requests: int, max_model_len: int, page_size: int) -> tuple[int, int]:
    """Sequences, and pages of each, for which an engine has room.

    Args:
        num_kv_heads: Of a layer.
        max_num_requests: Of a batch.
        max_model_len: Tokens of the longest request.
        page_size: Tokens of a page.
    """
    max_num_pages = -(-max_model_len // page_size)
    return min(max_num_requests, MOST_BYTES // (4 * max_num_pages * num_kv_heads)) * num_kv_heads, max_num_pages


def decode_by_head(layers: Mapping[str, Any], names: Iterable[str], room: Room) -> set[str]:
    """Lets layers decode in one call whose blocks can be seen as pages.

    Args:
        layers: vLLM's, by name, their caches in place.
        names: Layers that were split.
        room: Of the engine.

    Returns:
        Names of these layers' caches.
    """
    done: set[str] = set()
    counts: set[int] = set()
    for name in sorted(names, key=extract_layer_index):
        layer, split = layers[name], layers[name].impl
        compressed, full = (of_class.kv_heads for of_class in split.classes)
        pages = HeadPages.of(layers[full_name(name)].kv_cache, layer.kv_cache, full, compressed)
        if pages is None:
            continue
        layer.impl = DecodeByHead(split, name, pages, room, len(full) not in counts)
        counts.add(len(full))
        done |= {name, full_name(name)}
    return done
