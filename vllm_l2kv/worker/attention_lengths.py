"""Physical lengths for attention: what the cache holds, not what was computed.

Shared by both runners. RoPE, sampling and vLLM's own `seq_lens` keep logical positions; only metadata of compressed
groups becomes physical.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

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
