"""Blocks for compactions: whether there are enough, and which request is preempted if not."""

from collections.abc import Callable, Collection, Mapping
from time import monotonic
from typing import Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.capacity import Capacity
from vllm_l2kv.policy import Compaction
from vllm_l2kv.scheduler.cache_manager import CompressedLayerManager, TailManager, let_go_of_held
from vllm_l2kv.scheduler.stats_counter import StatsCounter


class Room:
    """Finds blocks for compactions, and keeps new requests from taking blocks that running requests will need soon.

    Args:
        scheduler: vLLM's scheduler, which preempts.
        capacity: The capacity of its KV cache.
        coming: Request id to next compaction, of requests that have begun or are about to; updated by the scheduler.
        stats_counter: Counts preemptions.
        blocks_in_use: Returns the ids of blocks that a KV connector is reading.
    """

    def __init__(
        self,
        scheduler: Any,
        capacity: Capacity,
        coming: Mapping[str, Compaction],
        stats_counter: StatsCounter,
        blocks_in_use: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._scheduler = scheduler
        self._capacity = capacity
        self._next = coming
        self._stats_counter = stats_counter
        self._blocks_in_use = blocks_in_use
        self._pool = scheduler.kv_cache_manager.block_pool
        self._managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._compressed = [manager for manager in self._managers if isinstance(manager, CompressedLayerManager)]
        self._tails = [manager for manager in self._managers if isinstance(manager, TailManager)]

    def find(self, request: Request, coming: Compaction, room_is_coming: bool) -> bool:
        """Preempts other requests, and finally the request itself, until there are blocks for its kept rows.

        Args:
            request: The request to compact.
            coming: Its compaction.
            room_is_coming: Whether other blocks become free before the next step.

        Returns:
            Whether the request can be compacted now. If not, it was preempted, or it computes nothing until blocks are
            free.
        """
        while not self.has_free_blocks(coming) and not self.fits_in_place(request, coming):
            # Once its own blocks are stored they can be used; preemption would make it publish and store them again.
            if room_is_coming or self._is_stored(request):
                return False
            if let_go_of_held(self._tails):
                continue
            victim = self._next_to_preempt()
            self._scheduler.running.remove(victim)
            self._scheduler._preempt_request(victim, monotonic())
            self._stats_counter.preempted()
            # With a KV connector, blocks that a step in flight may write become free when that step has finished.
            if victim is request or self._scheduler.deferred_frees:
                return False
        return True

    def would_lack(self, request: Request, coming: Compaction | None, num_computed_tokens: int) -> bool:
        """Whether admitting a request now would soon cause a preemption. Never if no other request runs.

        Either the request would take blocks that a compacted request has just freed and will need again. Or it begins
        on shared blocks, where it cannot be compacted in place, and the pool has no free blocks for its compaction.
        """
        if not self._scheduler.running:
            return False
        reserved = self._num_blocks_to_regrow(request)
        if coming is not None and num_computed_tokens > 0:
            reserved += self.num_destination_blocks(coming)
        if reserved == 0:
            return False
        num_tokens = request.num_tokens if coming is None else min(coming.position, request.num_tokens)
        num_coming = num_tokens - num_computed_tokens
        needed = self._capacity.num_held(num_coming, num_coming) + reserved
        if needed > self._pool.get_num_free_blocks():
            let_go_of_held(self._tails)
        return bool(needed > self._pool.get_num_free_blocks())

    def num_destination_blocks(self, coming: Compaction) -> int:
        """Number of blocks for the kept rows of a compaction."""
        return sum(manager.num_destination_blocks(coming.num_keep) for manager in self._compressed)

    def has_free_blocks(self, coming: Compaction) -> bool:
        """Whether the pool has enough free blocks for the kept rows."""
        num_free: int = self._pool.get_num_free_blocks()
        return self.num_destination_blocks(coming) <= num_free

    def fits_in_place(self, request: Request, coming: Compaction) -> bool:
        """Whether the kept rows can go into the request's own first blocks."""
        return all(manager.fits_in_place(request.request_id, coming.num_keep) for manager in self._compressed)

    def _is_stored(self, request: Request) -> bool:
        """Whether a KV connector is reading blocks of the request."""
        in_use = self._blocks_in_use()
        tables = (manager.req_to_blocks[request.request_id] for manager in self._compressed) if in_use else ()
        return any(block.block_id in in_use for table in tables for block in table)

    def _num_blocks_to_regrow(self, newcomer: Request) -> int:
        """Blocks that compacted requests will take until their next compaction or their end.

        Requests that are less urgent than the newcomer do not count, since they are preempted before it.
        """
        num_blocks = 0
        for req_id, coming in self._next.items():
            request = self._scheduler.requests.get(req_id)  # None: finished since the last step
            if request is None or request.status != RequestStatus.RUNNING or self._gives_way(request, newcomer):
                continue
            if coming.num_rows < coming.position:
                end = min(coming.position, request.num_prompt_tokens + request.max_tokens)
                num_rows = end - request.num_computed_tokens
                num_blocks += sum(num_blocks_for(num_rows, manager.block_size) for manager in self._compressed)
        return num_blocks

    def _gives_way(self, request: Request, newcomer: Request) -> bool:
        """Whether vLLM would preempt `request` before `newcomer`."""
        return self._scheduler.policy == SchedulingPolicy.PRIORITY and urgency(request) > urgency(newcomer)

    def _next_to_preempt(self) -> Request:
        """The running request that vLLM would preempt next."""
        if self._scheduler.policy == SchedulingPolicy.PRIORITY:
            return max(self._scheduler.running, key=urgency)
        return self._scheduler.running[-1]


def urgency(request: Request) -> tuple[int, float]:
    """Sort key of vLLM's priority policy; lower is more urgent."""
    return request.priority, request.arrival_time
