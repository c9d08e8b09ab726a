"""How many requests fit a KV cache."""

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

from vllm.config import DeviceConfig, VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MambaSpec, SlidingWindowSpec

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.capacity import Capacity
from vllm_l2kv.field_kinds import MAX_TOKENS
from vllm_l2kv.kv_cache_spec import CompressedLayerSpec, group_capacity, group_layer_specs, is_packed, token_bytes
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import Compaction, CompactionPoints, Intervals
from vllm_l2kv.seams import get_kv_cache_config_from_groups, get_kv_cache_groups, groups_of_rank


class Group(NamedTuple):
    """Layers that share a block table; a mixed layer is in two groups.

    Attributes:
        specs: Spec of each layer, for the heads of the group's class on one GPU.
    """

    specs: tuple[KVCacheSpec, ...]

    @property
    def spec(self) -> KVCacheSpec:
        """The spec of one layer; layers differ only in their number of heads."""
        return self.specs[0]

    @property
    def num_heads(self) -> int:
        """KV heads of all layers together."""
        return sum(spec.num_kv_heads for spec in self.specs if isinstance(spec, AttentionSpec))

    @property
    def kind(self) -> str:
        """Kind of the layers: `compressed`, `sliding`, `recurrent` or `full`."""
        kinds = {CompressedLayerSpec: "compressed", SlidingWindowSpec: "sliding", MambaSpec: "recurrent"}
        return next((kind for of_class, kind in kinds.items() if isinstance(self.spec, of_class)), "full")


@dataclass(frozen=True)
class Request:
    """The request that is planned; all requests are assumed to be alike.

    Attributes:
        num_prompt_tokens: Tokens of the prompt.
        num_output_tokens: Generated tokens.
        params: The request's compression.
        intervals: The engine's intervals.
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
        """Most rows that a head of a compressed layer holds."""
        return max([*(compaction.num_rows for compaction in self._compactions), *self.answer_rows])

    @property
    def kept_rows(self) -> int:
        """Rows after the prompt is computed, and compacted if a compaction is due."""
        return self._rows(self.num_prompt_tokens, bisect_right)

    @cached_property
    def answer_rows(self) -> list[int]:
        """Rows after each generated token, before any compaction that is due there."""
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
    """A document that many prompts begin with, and that is in the cache once.

    Attributes:
        num_tokens: Tokens of the document.
        params: The compression of its requests.
        intervals: The engine's intervals.
    """

    num_tokens: int
    params: CompressionParams
    intervals: Intervals

    @property
    def points(self) -> CompactionPoints:
        """The compactions of a request with one token after the document."""
        params = replace(self.params, prefix_tokens=self.num_tokens)
        return CompactionPoints(self.num_tokens + 1, params, self.intervals)

    @cached_property
    def compactions(self) -> list[Compaction]:
        """Those up to the end of the document."""
        return self.points.in_prompt()

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Where each part of that request ends, before a compaction or with its last token, and the rows held there."""
        before = [(compaction.position, compaction.num_rows) for compaction in self.compactions]
        return [*before, (self.num_tokens + 1, self.num_keep + 1)]

    @property
    def num_keep(self) -> int:
        """Rows of the document after its compactions."""
        return self.compactions[-1].num_keep if self.compactions else self.num_tokens


@dataclass(frozen=True)
class Cache:
    """The KV cache of a model, as vLLM lays it out.

    Attributes:
        groups: Groups of the model's layers, which share one pool of blocks.
        block_bytes: Bytes of a block on one GPU, padding included; with pipeline ranks, on the one that takes most.
        num_blocks: Number of blocks, as in vLLM's `num_gpu_blocks`.
        batch_tokens: Most prompt tokens in a step.
        num_steps: Most steps in flight at once; sliding layers hold their tokens in addition to the window.
    """

    groups: tuple[Group, ...]
    block_bytes: int
    num_blocks: int
    batch_tokens: int
    num_steps: int

    @property
    def num_usable(self) -> int:
        """Blocks for requests: all except vLLM's null block."""
        return self.num_blocks - 1

    def prompt_blocks(self, request: Request) -> int:
        """Most blocks that a request holds while its prompt is computed, which vLLM requires to admit it."""
        num_tokens = request.num_prompt_tokens
        return self._computing.num_held(num_tokens, request.points.max_rows(num_tokens))

    def compacted_blocks(self, request: Request) -> int:
        """Blocks of a request after its prompt is computed, and compacted if a compaction is due."""
        return self._answering.num_held(request.num_prompt_tokens, request.kept_rows)

    def answer_blocks(self, request: Request) -> list[int]:
        """Blocks of a request after each token that it generates."""
        rows = enumerate(request.answer_rows, start=request.num_prompt_tokens + 1)
        return [self._answering.num_held(num_tokens, num_rows) for num_tokens, num_rows in rows]

    def memory_ratio(self, num_tokens: int, num_rows: int) -> float:
        """See `Capacity.memory_ratio`."""
        return self._answering.memory_ratio(num_tokens, num_rows)

    def num_at_once(self, request: Request) -> int:
        """Requests that can run to their ends at the same time without preemption, whenever each of them began.

        In the worst case, all but one hold the most blocks of their answers while the last one's prompt is computed.
        """
        answering = max(self.answer_blocks(request))
        last = max(answering, self.prompt_blocks(request))
        return 1 + (self.num_usable - last) // answering if last <= self.num_usable else 0

    def num_on_average(self, request: Request) -> float:
        """Requests that run in a steady state, in which they are evenly spread over the lengths of their answers."""
        if not self.num_at_once(request):
            return 0.0
        return self.num_usable / statistics.fmean(self.answer_blocks(request))

    def document_blocks(self, document: Document) -> int:
        """Blocks of a document in the cache while no request uses it."""
        return sum(_num_findable(group, document) for group in self.groups)

    def num_documents(self, document: Document) -> int | None:
        """Number of such documents that stay in the cache if each is computed once, and nothing else runs.

        The last one needs the most room while it is computed: it is whole until its compaction, which is in place.

        Returns:
            The number. With budgets, sliding windows or recurrent layers, where the last one needs less than is
            counted, there may be one more. `None` for uncompressed documents in models with sliding windows or
            recurrent layers: vLLM caches the window, or the state, at the end of a prompt, so what others find depends
            on the text after the document.
        """
        kinds, num_tokens = {group.kind for group in self.groups}, document.num_tokens + 1
        if kinds & {"sliding", "recurrent"} and not document.compactions:
            return None
        if self._computing.num_held(num_tokens, document.points.max_rows(num_tokens)) > self.num_usable:
            return 0
        return 1 + max(0, self.num_usable - self._computed(document)) // self.document_blocks(document)

    def longest(self, params: CompressionParams, intervals: Intervals) -> int | None:
        """The largest `--max-model-len` with which an engine with these defaults starts.

        Without a budget the keep ratio does not matter, since a prompt is computed whole before it is compacted.

        Returns:
            Tokens of prompt and answer together; `None` if there is no limit.
        """

        def num_blocks(num_tokens: int) -> int:
            rows = CompactionPoints(num_tokens, params, intervals).max_rows(num_tokens)
            return self._computing.num_held(num_tokens, rows)

        fitting = bisect_right(range(1, MAX_TOKENS), self.num_usable, key=num_blocks)
        return fitting if fitting < MAX_TOKENS - 1 else None

    def _computed(self, document: Document) -> int:
        """Most blocks that a document takes while it is computed alone, and one token after it.

        What a compaction releases is reused before blocks of other documents.
        """
        ends, most = [0] * (1 + self.num_steps), 0
        for part_end, num_rows in document.parts:
            while ends[-1] < part_end:
                ends.append(min(self._step_end(ends[-1], document.num_tokens), part_end))
                ended, rows = ends[-1 - self.num_steps], num_rows - (part_end - ends[-1])
                most = max(most, sum(_num_held(group, ends, rows, ended) for group in self.groups))
        # States are copied after the last compaction, when those of the steps before are still held.
        num_copies, before = sum(group.kind == "recurrent" for group in self.groups), ends[-2 - self.num_steps]
        copying = sum(_num_held(group, ends[:-1], document.num_keep, before) for group in self.groups)
        # With the last token there is also what else of the document is cached.
        firsts = [min(ended, _cached_end(group, document) or ended) for group in self.groups]
        rows = document.num_keep + 1
        asking = sum(_num_held(group, ends, rows, first) for group, first in zip(self.groups, firsts, strict=True))
        return max(most, copying + num_copies, asking + num_copies)

    def _step_end(self, begin: int, num_tokens: int) -> int:
        """Where a step that begins at token `begin` of a document of `num_tokens` ends at the latest.

        With recurrent layers vLLM ends it where a state can be cached: at the end of a block.
        """
        end = begin + self.batch_tokens
        size = next((group.spec.block_size for group in self.groups if group.kind == "recurrent"), None)
        if size is None:
            return end
        whole: int = (begin // size + 1 if begin % size else min(end, num_tokens) // size) * size
        return whole if begin < whole < end else end

    @cached_property
    def _computing(self) -> Capacity:
        return self._capacity(self.num_steps, self.batch_tokens)

    @cached_property
    def _answering(self) -> Capacity:
        return self._capacity(num_steps=1, num_tokens=1)

    def _capacity(self, num_steps: int, num_tokens: int) -> Capacity:
        groups = tuple(group_capacity(group.spec, num_steps, num_tokens, MAX_TOKENS) for group in self.groups)
        compressed, full = (
            token_bytes(group.specs for group in self.groups if group.kind == kind) for kind in ("compressed", "full")
        )
        return Capacity(self.num_usable, groups, MAX_TOKENS, compressed_bytes=compressed, full_bytes=full)


def _num_held(group: Group, ends: Sequence[int], num_rows: int, num_ended: int) -> int:
    """Blocks of a request in a group while its last step is under way.

    Args:
        group: The group.
        ends: Number of tokens at the end of each of its steps.
        num_rows: Rows of compressed layers at the end of the last one.
        num_ended: Tokens of steps that have ended: blocks that a window or a state had passed by then are free.
    """
    num_tokens, size = ends[-1], int(group.spec.block_size)
    if isinstance(group.spec, SlidingWindowSpec):
        num_passed: int = max(0, num_ended - group.spec.sliding_window + 1)
        return num_blocks_for(num_tokens, size) - num_passed // size
    if group.kind == "recurrent":
        return len({num_blocks_for(end, size) for end in ends if end >= max(num_ended, 1)})
    return group_capacity(group.spec, 1, 1, MAX_TOKENS).num_blocks(num_tokens, num_rows)


def _num_findable(group: Group, document: Document) -> int:
    """Blocks of a document in a group while no request uses it."""
    num_tokens, also = document.num_tokens, _cached_end(group, document)
    if group.kind == "recurrent":
        return bool(document.compactions) + (also is not None)
    return _num_held(group, [num_tokens], document.num_keep, num_tokens if also is None else also)


def _cached_end(group: Group, document: Document) -> int | None:
    """Where vLLM caches a window or a state of a document besides: at the end of its last whole block.

    Only of tokens before the first compaction. Otherwise `None`.
    """
    spec, compactions = group.spec, document.compactions
    num_whole = compactions[0].position if compactions else document.num_tokens
    window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else 1
    end: int = document.num_tokens - document.num_tokens % spec.block_size
    return end if end > 0 and num_whole > end - window else None


def cache_of(ranks: Sequence[Mapping[str, KVCacheSpec]], num_bytes: int, batch_tokens: int, num_steps: int) -> Cache:
    """Lays out a KV cache with vLLM's planner. Every pipeline rank gets as many blocks as the one with least room.

    Args:
        ranks: Of each pipeline rank, specs of its layers on one GPU: vLLM's, or those of
            `kv_cache_spec.classify_ranks`.
        num_bytes: Memory for the cache on each GPU, in bytes.
        batch_tokens: vLLM's `--max-num-batched-tokens`.
        num_steps: Most steps in flight at once.

    Raises:
        ValueError: The memory is less than two blocks, of which vLLM uses one itself.
    """
    # The device is not used here, but vLLM would look for one, and fail on a machine where it knows none.
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    specs = {name: spec for rank in ranks for name, spec in rank.items()}
    config.cache_config.kv_cache_layout = "BLHNC" if is_packed(specs.values()) else "LBHNC"
    groups = get_kv_cache_groups(config, specs)
    plans = [
        get_kv_cache_config_from_groups(config, groups_of_rank(groups, dict(rank)), max(0, num_bytes)) for rank in ranks
    ]
    num_blocks = min(plan.num_blocks for plan in plans)
    if num_blocks < 2:
        raise ValueError(
            f"the KV cache must have at least two blocks, got {num_bytes / 2**30:.2f} GiB; give more memory or GPUs."
        )
    return Cache(
        groups=tuple(Group(tuple(group_layer_specs(group).values())) for group in groups),
        block_bytes=max(plan.kv_cache_tensors[0].size // plan.num_blocks for plan in plans),
        num_blocks=num_blocks,
        batch_tokens=batch_tokens,
        num_steps=num_steps,
    )
