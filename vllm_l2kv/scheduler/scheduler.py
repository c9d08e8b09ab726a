"""When a request is compacted: at the first step after its prefill, before that step schedules anything.

Plans compactions and leaves the rest to vLLM's scheduler. Knows nothing of keys, norms or devices.
"""

from collections.abc import Iterable
from typing import Any

from vllm import envs
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.messages.orders import CompactionOrder, attach_orders, seconds_of
from vllm_l2kv.messages.stats import attach_stats
from vllm_l2kv.messages.usage import KeptWhole, PromptUsage, attach_usage, prompt_usage, why_whole
from vllm_l2kv.params import Asked, check_session
from vllm_l2kv.policy import num_keep
from vllm_l2kv.refusals import check_supported
from vllm_l2kv.scheduler.cache_manager import (
    CompressedLayerManager,
    announce_hit,
    find_prefixes_inside_blocks,
    stop_prefix_caching,
)
from vllm_l2kv.scheduler.decode_fast_path import with_decode_fast_path
from vllm_l2kv.scheduler.failed_requests import Refusals
from vllm_l2kv.scheduler.request_state import RequestState
from vllm_l2kv.scheduler.stats_counter import StatsCounter
from vllm_l2kv.settings import Settings

# vLLM configures logging below its own name only.
logger = init_logger(f"vllm.{__name__}")


class L2KVScheduler(AsyncScheduler):
    """vLLM's async scheduler that also compacts.

    A subclass of `Scheduler` would silently lose async scheduling.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_supported(self.vllm_config)
        self.settings = Settings.from_config(self.vllm_config.additional_config)
        find_prefixes_inside_blocks(self.kv_cache_manager.coordinator)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.kv_cache_manager: Any = with_decode_fast_path(self.kv_cache_manager)
        self._compressed = [manager for manager in managers if isinstance(manager, CompressedLayerManager)]
        if not self._compressed:
            raise ValueError(
                "No KV-cache group is managed by vllm-l2kv: pass its worker class together with its scheduler class, "
                "and if VLLM_PLUGINS is set, add l2kv to it."
            )
        self._states: dict[str, RequestState] = {}  # unfinished requests that report their numbers
        self._due: dict[str, RequestState] = {}  # of these, begun and to be compacted, oldest first
        self._refusals = Refusals(self)
        self._stats_counter = StatsCounter() if self.settings.metrics and self.log_stats else None
        if self._stats_counter is not None and "l2kv" not in (envs.VLLM_PLUGINS or ()):
            raise ValueError(
                "additional_config['l2kv']['metrics'] needs vllm-l2kv's part of the API server, since vLLM's own fails "
                "on these statistics: set VLLM_PLUGINS=l2kv, or leave metrics out."
            )

    def add_request(self, request: Request) -> None:
        """Reads the request's `kv_` fields; otherwise the same contract as upstream.

        A bad value fails this request alone. The server and `compression()` refuse it before it comes here.
        """
        # vLLM accepts the id of a request that has just finished, before a step reports its end.
        self._forget((request.request_id,))
        if request.resumable or request.request_id in self.requests:
            self._add_chunk(request)
            return
        if self._refusals.of_failed_session(request.request_id) is not None:
            self._refusals.end_sessions((request.request_id,))
            return
        try:
            asked = self._read_fields(request)
        except ParamError as error:
            self._refuse(request.request_id, str(error))
        else:
            if asked.reports:
                params = asked.params if asked.params.keep_ratio < 1 else None
                usage = whole(request, why_whole(request.num_prompt_tokens, asked.params))
                self._states[request.request_id] = RequestState(params, usage)
        super().add_request(request)

    def _add_chunk(self, request: Request) -> None:
        """Adds a chunk of a streaming-input session, or the request that ends one: not resumable, without fields.

        A session is not compressed, since its next chunk is computed on the whole cache. A chunk that asks for
        compression fails the session.
        """
        req_id = request.request_id
        if request.resumable:
            try:
                asked = self._read_fields(request)
                check_session(asked)
            except ParamError as error:
                self._refuse(req_id, str(error))
            else:
                failed = self._refusals.of_failed_session(req_id)
                if failed is not None:
                    self._refuse(req_id, failed)
                elif asked.reports:
                    reason = KeptWhole.SESSION if asked.params.keep_ratio < 1 else None
                    self._states[req_id] = RequestState(None, whole(self.requests.get(req_id, request), reason))
        super().add_request(request)

    def finish_requests(self, request_ids: Any, *args: Any, **kwargs: Any) -> list[Request]:
        """Same contract as upstream; also ends sessions that have failed."""
        if request_ids is not None:
            request_ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        self._refusals.end_sessions(request_ids)
        return super().finish_requests(request_ids, *args, **kwargs)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Plans compactions, then schedules as vLLM does; the orders travel on the step's output."""
        orders = self._compact_prefilled()
        output = super().schedule(*args, **kwargs)
        # The step may have preempted a request that was compacted above. Its blocks may belong to another request by
        # now, so the worker must not get the order.
        orders = [order for order in orders if self._is_compacted(order.req_id)]
        if orders:
            attach_orders(output, tuple(orders))
        if self._states:
            self._track(output)
        self._forget(output.finished_req_ids)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """Same contract as upstream; outputs of requests that report their numbers carry them.

        Every output, not only the last: when the front end ends a request at a stop string, the engine never makes a
        last one.
        """
        if self._stats_counter is not None:
            self._stats_counter.measured(seconds_of(model_runner_output))
        refused = self._refusals.about_to_fail(self.requests)
        outputs_of_clients = super().update_from_output(scheduler_output, model_runner_output)
        self._refusals.explain(refused, outputs_of_clients)
        if self._states:
            for outputs in outputs_of_clients.values():
                for output in outputs.outputs:
                    state = self._states.get(output.request_id)
                    if state is not None:
                        attach_usage(output, state.usage)
        return outputs_of_clients

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Same contract as upstream, with the statistics of compactions attached."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self._stats_counter is not None:
            logical_tokens = sum(request.num_computed_tokens for request in self.running)
            num_evicted = sum(self._compressed[0].num_evicted.values())
            attach_stats(stats, self._stats_counter.take(logical_tokens, logical_tokens - num_evicted))
        return stats

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Same contract as upstream, but KV events of a hit, if the request wants them, come from `announce_hit`."""
        mode = request.kv_cache_report_mode
        if mode != "full" or not self.kv_cache_manager.enable_kv_cache_events:
            return super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        request.kv_cache_report_mode = "incremental"
        try:
            hit = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        finally:
            request.kv_cache_report_mode = mode
        _, num_tokens, *_ = hit
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            announce_hit(manager, request, num_tokens)
        return hit

    def _compact_prefilled(self) -> list[CompactionOrder]:
        """Compacts every request that is ready and for which there are blocks."""
        orders: list[CompactionOrder] = []
        released: list[KVCacheBlock] = []
        for req_id, state in list(self._due.items()):
            request = self.requests.get(req_id)  # None: finished since the last step
            if request is not None and self._is_ready(request):
                order = self._compact(request, state, released)
                if order is not None:
                    orders.append(order)
        pool = self.kv_cache_manager.block_pool
        num_free = pool.get_num_free_blocks()
        # Tails first: the pool evicts in this order, so the beginnings of prompts stay cached longest.
        pool.free_blocks(reversed(released))
        if self._stats_counter is not None:
            self._stats_counter.freed(pool.get_num_free_blocks() - num_free)
        return orders

    def _is_ready(self, request: Request) -> bool:
        """Whether the last chunk of the prefill has been scheduled and another step will follow."""
        scheduled_output = request.num_output_tokens + request.num_output_placeholders
        return (
            request.status == RequestStatus.RUNNING
            and not request.is_prefill_chunk
            and request.num_computed_tokens >= request.num_prompt_tokens
            and scheduled_output < request.max_tokens
        )

    def _compact(self, request: Request, state: RequestState, released: list[KVCacheBlock]) -> CompactionOrder | None:
        """Compacts one request, or leaves it for a later step if there are no blocks to move it to."""
        req_id, num_prompt_tokens, params = request.request_id, request.num_prompt_tokens, state.params
        assert params is not None, "a request that is kept whole is never due"
        keep = num_keep(num_prompt_tokens, params)
        num_evicted = num_prompt_tokens - keep
        if num_evicted == 0:
            del self._due[req_id]
            return None
        # Tokens beyond the prompt: generated while compaction waited for blocks, or before a preemption. All kept.
        num_slots = request.num_computed_tokens - num_evicted
        needed = sum(manager.num_destination_blocks(num_slots) for manager in self._compressed)
        in_place = needed > self.kv_cache_manager.block_pool.get_num_free_blocks()
        if in_place and not all(manager.fits_in_place(req_id, num_slots) for manager in self._compressed):
            state.usage = whole(request, KeptWhole.NO_BLOCKS)
            if self._stats_counter is not None:
                self._stats_counter.waited(state)
            return None

        # The last chance to cache the prompt: what is computed from now on depends on the compaction.
        self.kv_cache_manager.cache_blocks(request, min(request.num_computed_tokens, request.num_tokens))
        moves = []
        for manager in self._compressed:
            move, blocks = manager.compact(req_id, num_evicted, num_slots, in_place)
            moves.append(move)
            released.extend(blocks)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            stop_prefix_caching(manager, req_id)
        del self._due[req_id]
        state.usage = prompt_usage(num_prompt_tokens, keep)
        if self._stats_counter is not None:
            self._stats_counter.compacted(state, keep, num_evicted, 0 if in_place else needed)
        return CompactionOrder(
            req_id=req_id,
            num_prompt_tokens=num_prompt_tokens,
            num_keep=keep,
            num_tokens=request.num_computed_tokens,
            params=params,
            moves=tuple(moves),
        )

    def _is_compacted(self, req_id: str) -> bool:
        return req_id in self._compressed[0].num_evicted

    def _track(self, output: SchedulerOutput) -> None:
        """Notes requests that begin a prefill in this step, for the first time or after a preemption."""
        begun = (new.req_id for new in output.scheduled_new_reqs)
        for req_id in (*begun, *output.scheduled_cached_reqs.resumed_req_ids):
            request, state = self.requests[req_id], self._states.get(req_id)
            if state is None:
                continue
            if state.params is None:
                # It may be a session whose prompt has grown.
                state.usage = whole(request, state.usage.get("reason"))
            else:
                self._due[req_id] = state
                state.usage = whole(request, why_whole(request.num_prompt_tokens, state.params))

    def _read_fields(self, request: Request) -> Asked:
        """What a request asks. Checked here too: one of an offline engine passes no front end.

        Raises:
            ParamError: A bad value.
        """
        extra_args = request.sampling_params.extra_args if request.sampling_params else None
        return self.settings.defaults.read(extra_args)

    def _refuse(self, req_id: str, sentence: str) -> None:
        logger.error("Request %s is refused: %s", req_id, sentence)
        self._refusals.refuse(req_id, sentence)

    def _forget(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            if req_id not in self.requests:
                self._refusals.forget((req_id,))
                self._states.pop(req_id, None)
                self._due.pop(req_id, None)


def whole(request: Request, reason: str | None) -> PromptUsage:
    """The numbers of a prompt of which nothing is evicted."""
    return prompt_usage(request.num_prompt_tokens, request.num_prompt_tokens, reason)
