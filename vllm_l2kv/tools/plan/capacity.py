"""How many requests fit a KV cache."""

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

from vllm.config import DeviceConfig, VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MambaSpec, SlidingWindowSpec

from vllm_l2kv.capacity import Capacity
from vllm_l2kv.field_kinds import MAX_TOKENS
from vllm_l2kv.kv_cache_spec import CompressedLayerSpec, group_capacity, group_layer_specs, is_packed, token_bytes
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import Compaction, CompactionPoints, Intervals
from vllm_l2kv.seams import get_kv_cache_config_from_groups, get_kv_cache_groups


class Group(NamedTuple):
    """Layers with one block table; a layer that has full and other heads is in two of them.

    Attributes:
        specs: Of each layer: heads of the group's class on one GPU.
    """

    specs: tuple[KVCacheSpec, ...]

    @property
    def spec(self) -> KVCacheSpec:
        """Of one of the layers; they differ in nothing but their number of heads."""
        return self.specs[0]

    @property
    def num_heads(self) -> int:
        """KV heads of all layers."""
        return sum(spec.num_kv_heads for spec in self.specs if isinstance(spec, AttentionSpec))

    @property
    def kind(self) -> str:
        """What its layers hold of a request: `compressed`, `sliding`, `recurrent` or `full`."""
        kinds = {CompressedLayerSpec: "compressed", SlidingWindowSpec: "sliding", MambaSpec: "recurrent"}
        return next((kind for of_class, kind in kinds.items() if isinstance(self.spec, of_class)), "full")


@dataclass(frozen=True)
class Request:
    """What every request is taken to look like.

    Attributes:
        num_prompt_tokens: Tokens of the prompt.
        num_output_tokens: Generated tokens.
        params: What it asks of its KV cache.
        intervals: Those of the engine.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    params: CompressionParams
    intervals: Intervals

    @property
    def points(self) -> CompactionPoints:
        """Its compactions."""
        return CompactionPoints(self.num_prompt_tokens, self.params, self.intervals)

    @cached_property
    def peak_rows(self) -> int:
        """Rows that a head of a compressed layer holds at most."""
        return max([*(compaction.num_rows for compaction in self._compactions), *self.answer_rows])

    @property
    def kept_rows(self) -> int:
        """Rows that are left when the prompt is computed, and compacted if that is due."""
        return self._rows(self.num_prompt_tokens, bisect_right)

    @cached_property
    def answer_rows(self) -> list[int]:
        """Rows after each generated token, before a compaction that is due there."""
        n = self.num_prompt_tokens
        return [self._rows(n + generated, bisect_left) for generated in range(1, self.num_output_tokens + 1)]

    @cached_property
    def _compactions(self) -> list[Compaction]:
        return list(self.points.until(self.num_prompt_tokens + self.num_output_tokens))

    def _rows(self, num_tokens: int, bisect: Callable[..., int]) -> int:
        """Rows at this number of computed tokens, before (`bisect_left`) or after a compaction there."""
        num_passed = bisect(self._compactions, num_tokens, key=attrgetter("position"))
        return num_tokens - (self._compactions[num_passed - 1].num_evicted if num_passed else 0)


@dataclass(frozen=True)
class Document:
    """The first tokens of many prompts, in the cache once for all of them.

    Attributes:
        num_tokens: Its tokens.
        params: What its requests ask of their KV cache.
        intervals: Those of the engine.
    """

    num_tokens: int
    params: CompressionParams
    intervals: Intervals

    @property
    def compactions(self) -> list[Compaction]:
        """Those of a request that asks one token about it, up to its end."""
        params = replace(self.params, prefix_tokens=self.num_tokens)
        return CompactionPoints(self.num_tokens + 1, params, self.intervals).in_prompt()

    @property
    def num_keep(self) -> int:
        """Rows that are left of it."""
        compactions = self.compactions
        return compactions[-1].num_keep if compactions else self.num_tokens


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

    def prompt_blocks(self, request: Request) -> int:
        """Blocks that a request holds at most while its prompt is computed, for which vLLM asks to admit it."""
        num_tokens = request.num_prompt_tokens
        return self._computing.num_held(num_tokens, request.points.max_rows(num_tokens))

    def compacted_blocks(self, request: Request) -> int:
        """Blocks of a request whose prompt is computed, and compacted if that is due."""
        return self._answering.num_held(request.num_prompt_tokens, request.kept_rows)

    def answer_blocks(self, request: Request) -> list[int]:
        """Blocks of a request after each token that it generates."""
        rows = enumerate(request.answer_rows, start=request.num_prompt_tokens + 1)
        return [self._answering.num_held(num_tokens, num_rows) for num_tokens, num_rows in rows]

    def memory_ratio(self, num_tokens: int, num_rows: int) -> float:
        """Memory of the whole cache, see `Capacity.memory_ratio`."""
        return self._answering.memory_ratio(num_tokens, num_rows)

    def num_at_once(self, request: Request) -> int:
        """Requests that run to their ends side by side, whenever each of them began.

        All but one may hold as much as they ever do in their answers while the prompt of the last one is computed.
        """
        answering = max(self.answer_blocks(request))
        last = max(answering, self.prompt_blocks(request))
        return 1 + (self.num_usable - last) // answering if last <= self.num_usable else 0

    def num_on_average(self, request: Request) -> float:
        """Requests that run in a steady state, in which they are spread evenly over their answers."""
        if not self.num_at_once(request):
            return 0.0
        return self.num_usable / statistics.fmean(self.answer_blocks(request))

    def document_blocks(self, document: Document) -> int:
        """Blocks of a document while nothing is asked about it."""
        return self._answering.num_held(document.num_tokens, document.num_keep)

    def num_documents(self, document: Document) -> int | None:
        """Such documents that stay findable if they are warmed up one after the other, and nothing else runs.

        The last one is computed beside the others: it is whole until a compaction, which then happens in place.

        Returns:
            Their number; `None` for models with sliding windows or recurrent layers, which do not share compressed
            documents, and of which ordinary prefixes are found by what is left of windows and states.
        """
        if any(group.kind in ("sliding", "recurrent") for group in self.groups):
            return None
        num_tokens = document.num_tokens
        whole = [(compaction.position, compaction.num_rows) for compaction in document.compactions]
        computed = max(self._computing.num_held(*held) for held in whole or [(num_tokens, num_tokens)])
        if computed > self.num_usable:
            return 0
        kept = self.document_blocks(document)
        # A token must follow the document, in its last blocks if they have room.
        asked = self._answering.num_held(num_tokens + 1, document.num_keep + 1) - kept
        return 1 + max(0, self.num_usable - computed - asked) // kept

    def longest(self, params: CompressionParams, intervals: Intervals) -> int | None:
        """Tokens of the longest request, prompt and answer, with which an engine of these defaults starts.

        Without a budget it is whole, at any keep ratio: its prompt is computed before it is compacted.

        Returns:
            The largest `--max-model-len`; `None` if any fits.
        """

        def num_blocks(num_tokens: int) -> int:
            rows = CompactionPoints(num_tokens, params, intervals).max_rows(num_tokens)
            return self._computing.num_held(num_tokens, rows)

        fitting = bisect_right(range(1, MAX_TOKENS), self.num_usable, key=num_blocks)
        return fitting if fitting < MAX_TOKENS - 1 else None

    @cached_property
    def _computing(self) -> Capacity:
        return self._capacity(self.max_in_flight_tokens)

    @cached_property
    def _answering(self) -> Capacity:
        return self._capacity(max_in_flight_tokens=1)

    def _capacity(self, max_in_flight_tokens: int) -> Capacity:
        groups = tuple(group_capacity(group.spec, max_in_flight_tokens, MAX_TOKENS) for group in self.groups)
        compressed, full = (
            token_bytes(group.specs for group in self.groups if group.kind == kind) for kind in ("compressed", "full")
        )
        return Capacity(self.num_usable, groups, MAX_TOKENS, compressed_bytes=compressed, full_bytes=full)


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
        groups=tuple(Group(tuple(group_layer_specs(group).values())) for group in groups),
        block_bytes=plan.kv_cache_tensors[0].size // plan.num_blocks,
        num_blocks=plan.num_blocks,
        max_in_flight_tokens=max_in_flight_tokens,
    )
