"""How many requests fit a KV cache."""

import statistics
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vllm.config import DeviceConfig, VllmConfig
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.field_kinds import MAX_TOKENS
from vllm_l2kv.kv_cache_spec import CompressedLayerSpec, group_layer_specs, is_packed
from vllm_l2kv.seams import get_kv_cache_config_from_groups, get_kv_cache_groups


class Group(NamedTuple):
    """Layers with one block table.

    Attributes:
        num_layers: How many.
        spec: Of one of them.
    """

    num_layers: int
    spec: KVCacheSpec

    @property
    def kind(self) -> str:
        """What its layers hold of a request: `compressed`, `sliding` or `full`."""
        if isinstance(self.spec, CompressedLayerSpec):
            return "compressed"
        return "sliding" if isinstance(self.spec, SlidingWindowSpec) else "full"


@dataclass(frozen=True)
class Request:
    """What every request is taken to look like.

    Attributes:
        num_prompt_tokens: Tokens of the prompt.
        num_output_tokens: Generated tokens.
        num_kept: Prompt tokens in compressed layers once the prompt is computed.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_kept: int


@dataclass(frozen=True)
class Cache:
    """The KV cache of one GPU, as vLLM lays it out.

    Attributes:
        groups: Groups of layers; each takes its blocks from the one pool.
        block_bytes: Bytes of a block, padding included.
        num_blocks: Blocks, as vLLM's `num_gpu_blocks` counts them.
        max_in_flight_tokens: Prompt tokens that may be under way at once; sliding layers hold them beside the window.
    """

    groups: tuple[Group, ...]
    block_bytes: int
    num_blocks: int
    max_in_flight_tokens: int

    @property
    def num_usable(self) -> int:
        """Blocks for requests; one is vLLM's null block."""
        return self.num_blocks - 1

    def prompt_blocks(self, num_tokens: int) -> int:
        """Blocks of a request whose cache is whole: while its prompt is computed, or uncompressed."""
        return self._blocks(num_tokens, num_tokens, self.max_in_flight_tokens)

    def blocks(self, request: Request, num_generated: int) -> int:
        """Blocks of a request that has generated so many tokens."""
        num_tokens = request.num_prompt_tokens + num_generated
        return self._blocks(num_tokens, request.num_kept + num_generated, max_in_flight_tokens=1)

    def num_at_once(self, request: Request) -> int:
        """Requests that run to their ends side by side, whenever each of them began.

        All but one may have generated all their tokens while the prompt of the last one is computed.
        """
        at_end = self.blocks(request, request.num_output_tokens)
        last = max(at_end, self.prompt_blocks(request.num_prompt_tokens))
        return 1 + (self.num_usable - last) // at_end if last <= self.num_usable else 0

    def num_on_average(self, request: Request) -> float:
        """Requests that run in a steady state, in which a request has generated half of its tokens on average."""
        if not self.num_at_once(request):
            return 0.0
        return self.num_usable / statistics.fmean(
            self.blocks(request, num_generated) for num_generated in range(1, request.num_output_tokens + 1)
        )

    def longest(self) -> int:
        """Tokens of the longest request that fits, prompt and answer.

        Whole, at any keep ratio: vLLM starts only if an uncompressed request of `--max-model-len` fits.
        """
        return bisect_right(range(MAX_TOKENS), self.num_usable, key=self.prompt_blocks) - 1

    def _blocks(self, num_tokens: int, num_slots: int, max_in_flight_tokens: int) -> int:
        total = 0
        for group in self.groups:
            held = num_slots if group.kind == "compressed" else num_tokens
            num_blocks = num_blocks_for(held, group.spec.block_size)
            if isinstance(group.spec, SlidingWindowSpec):
                bound = group.spec.max_admission_blocks_per_request(max_in_flight_tokens, num_tokens)
                num_blocks = min(num_blocks, bound)
            total += num_blocks
        return total


def cache_of(specs: Mapping[str, KVCacheSpec], num_bytes: int, max_in_flight_tokens: int) -> Cache:
    """What vLLM's planner makes of a memory.

    Args:
        specs: Of the layers on one GPU: vLLM's, or those that `kv_cache_spec.classify_layers` made of them.
        num_bytes: Memory for the cache on that GPU.
        max_in_flight_tokens: vLLM's `--max-num-batched-tokens` times the steps that may be under way at once.

    Raises:
        ValueError: Less memory than two blocks, of which vLLM uses one itself.
    """
    # The device is asked nothing, and must not be looked for: vLLM may know none here, and then expects little of it.
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    config.cache_config.kv_cache_layout = "BLHNC" if is_packed(specs.values()) else "LBHNC"
    groups = get_kv_cache_groups(config, dict(specs))
    plan = get_kv_cache_config_from_groups(config, groups, max(0, num_bytes))
    if plan.num_blocks < 2:
        raise ValueError(f"{num_bytes / 2**30:.2f} GiB are left for the KV cache, which is less than two blocks.")
    return Cache(
        groups=tuple(Group(len(group.layer_names), next(iter(group_layer_specs(group).values()))) for group in groups),
        block_bytes=plan.kv_cache_tensors[0].size // plan.num_blocks,
        num_blocks=plan.num_blocks,
        max_in_flight_tokens=max_in_flight_tokens,
    )
