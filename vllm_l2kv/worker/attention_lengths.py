"""Physical lengths for attention: what the cache holds, not what was computed.

Shared by both runners. RoPE, sampling and vLLM's own `seq_lens` keep logical positions; only metadata of compressed
groups becomes physical.
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
        """Same contract as upstream, with physical lengths; a graph keeps their address."""
        return super().build_metadata_for_cudagraph_capture(self.make_physical(common_attn_metadata), *args, **kwargs)


def make_groups_physical(
    attn_groups: list[list[AttentionGroup]], group_ids: Iterable[int], make_physical: MakePhysical
) -> None:
    """Replaces groups by physical ones, in the runner's own lists: other parts of the runner may hold them too."""
    for group_id in group_ids:
        groups = attn_groups[group_id]
        groups[:] = [PhysicalAttentionGroup.of(group, make_physical) for group in groups]


def with_physical_lengths(
    metadata: CommonAttentionMetadata, seq_lens: torch.Tensor, num_evicted: torch.Tensor
) -> CommonAttentionMetadata:
    """The metadata with physical lengths wherever a backend may look for them; vLLM's own tensors stay as they are.

    FlashAttention splits a request's keys by the longest length on the host: at a logical one, a request that holds
    few rows of many positions would be cut into splits that are mostly empty. FlashInfer finds pages by the lengths on
    the host. Ranges of images say which queries see later keys: rows since the last compaction lie in the order of
    their positions, and all queries see those before it.

    Args:
        metadata: Of a batch, maybe padded.
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
