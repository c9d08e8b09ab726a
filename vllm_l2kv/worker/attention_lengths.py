"""Physical lengths for attention: rows in the cache instead of computed tokens.

Shared by both runners. RoPE, sampling and vLLM's own `seq_lens` keep logical positions; only the attention metadata of
compressed groups gets physical lengths.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

MakePhysical = Callable[[CommonAttentionMetadata], CommonAttentionMetadata]


@dataclass(eq=False)
class PhysicalAttentionGroup(AttentionGroup):
    """An attention group whose metadata carries physical lengths."""

    make_physical: MakePhysical = lambda metadata: metadata

    @classmethod
    def of(cls, group: AttentionGroup, make_physical: MakePhysical) -> Self:
        """The same group, with physical lengths."""
        state = {field.name: getattr(group, field.name) for field in fields(AttentionGroup)}
        return cls(**state, make_physical=make_physical)

    def build_metadata(self, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any) -> Any:
        """Same contract as upstream, with physical lengths."""
        return super().build_metadata(self.make_physical(common_attn_metadata), *args, **kwargs)

    def build_metadata_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any
    ) -> Any:
        """Same contract as upstream, with physical lengths at a fixed address, which CUDA graphs read."""
        return super().build_metadata_for_cudagraph_capture(self.make_physical(common_attn_metadata), *args, **kwargs)


def make_groups_physical(
    attn_groups: list[list[AttentionGroup]], group_ids: Iterable[int], make_physical: MakePhysical
) -> None:
    """Replaces groups by ones with physical lengths, in place: other parts of the runner may hold the same lists."""
    for group_id in group_ids:
        groups = attn_groups[group_id]
        groups[:] = [PhysicalAttentionGroup.of(group, make_physical) for group in groups]


def with_physical_lengths(
    metadata: CommonAttentionMetadata, seq_lens: torch.Tensor, num_evicted: torch.Tensor
) -> CommonAttentionMetadata:
    """A copy of the metadata with physical lengths in every attribute that a backend may read.

    vLLM's own tensors are not changed. FlashAttention chooses the number of splits by the longest length on the host:
    with logical lengths, most splits of a compacted request would be empty. FlashInfer finds pages by the lengths on
    the host. Ranges of images say which queries see later keys. They are shifted too: rows after the last compaction
    are in the order of their positions, and all queries see the rows before it.

    Args:
        metadata: Metadata of a batch, possibly padded.
        seq_lens: `[num_reqs_padded]` int32 on the device, physical.
        num_evicted: `[num_reqs]` int32 on the host, evicted tokens in batch order.
    """
    on_host = metadata.seq_lens_cpu_upper_bound.clone()
    on_host[: num_evicted.shape[0]] -= num_evicted
    images = metadata.mm_req_doc_ranges
    if images is not None:
        evicted = num_evicted.tolist()
        images = {i: [(start - evicted[i], end - evicted[i]) for start, end in of] for i, of in images.items()}
    return metadata.replace(
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=on_host,
        max_seq_len=int(on_host.max()),
        mm_req_doc_ranges=images,
    )
