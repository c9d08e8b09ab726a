"""vLLM's scheduler, extended to compact each request exactly at its compaction points.

Plans compactions and leaves everything else to vLLM's scheduler. Knows nothing of keys, norms or devices.
"""

from collections.abc import Iterable
from typing import Any

from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector import SimpleCPUOffloadConnector
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from vllm_l2kv.capacity import DoesNotFitError
from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.kv_cache_spec import capacity_of, with_zeroed_blocks
from vllm_l2kv.log import logger_of
from vllm_l2kv.messages.orders import CompactionOrder, attach_compacted_hits, attach_orders, seconds_of
from vllm_l2kv.messages.stats import attach_stats
from vllm_l2kv.messages.usage import KeptWhole, attach_usage, why_whole
from vllm_l2kv.params import Asked, check_session
from vllm_l2kv.policy import Compaction, CompactionPoints, Images, image_around
from vllm_l2kv.refusals import TRANSFERRING, check_images, check_seed, check_supported, reads_images_as_a_whole
from vllm_l2kv.scheduler.cache_manager import (
    CompressedLayerManager,
    LayerManager,
    RecurrentLayerManager,
    TailManager,
    announce_hit,
    find_prefixes_inside_blocks,
    stop_prefix_caching,
)
from vllm_l2kv.scheduler.cpu_memory import CPUMemory
from vllm_l2kv.scheduler.decode_fast_path import with_decode_fast_path
from vllm_l2kv.scheduler.external_hits import ExternalHits
from vllm_l2kv.scheduler.failed_requests import Refusals
from vllm_l2kv.scheduler.held_blocks import with_held_blocks
from vllm_l2kv.scheduler.request_state import RequestState
from vllm_l2kv.scheduler.room import Room
from vllm_l2kv.scheduler.shared_prefixes import Prefix, SharedPrefixes
from vllm_l2kv.scheduler.stats_counter import StatsCounter
from vllm_l2kv.scheduler.superseded_blocks import SupersededBlocks
from vllm_l2kv.scheduler.transfers import Transfers, is_decoded_elsewhere
from vllm_l2kv.settings import Settings

logger = logger_of(__name__)


class L2KVScheduler(AsyncScheduler):
    """vLLM's async scheduler that also compacts.

    A request is compacted at fixed positions (`policy.CompactionPoints`). A chunk of its tokens ends at each of them,
    and no later token is computed before the compaction. The kept rows go into free blocks or into the request's own
    blocks; if neither suffices, requests are preempted. So an answer depends only on its request.

    It subclasses `AsyncScheduler`, since a subclass of `Scheduler` would silently lose async scheduling.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, with_zeroed_blocks(kv_cache_config), *args, **kwargs)
        check_supported(self.vllm_config)
        self.settings = Settings.from_config(self.vllm_config.additional_config)
        find_prefixes_inside_blocks(self.kv_cache_manager.coordinator)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._layers = [manager for manager in managers if isinstance(manager, LayerManager)]
        self._tails = [manager for manager in managers if isinstance(manager, TailManager)]
        self.kv_cache_manager: Any = with_held_blocks(with_decode_fast_path(self.kv_cache_manager))
        self._compressed = [manager for manager in managers if isinstance(manager, CompressedLayerManager)]
        self._recurrent = [manager for manager in managers if isinstance(manager, RecurrentLayerManager)]
        if not self._compressed:
            raise ValueError(
                "vllm-l2kv manages no KV-cache group: pass its worker class together with its scheduler class, and if "
                "VLLM_PLUGINS is set, add l2kv to it."
            )
        self._shared = SharedPrefixes(self.kv_cache_manager, self.cache_config.prefix_caching_hash_algo)
        self._cpu_memory: CPUMemory | None = None
        if self.connector is not None:
            self.connector: Any = self._with_bounds(self.connector)
        self._superseded = SupersededBlocks(
            self.kv_cache_manager.block_pool, is_offloading=self._cpu_memory is not None
        )
        self._capacity = capacity_of(self.kv_cache_config, self.vllm_config)
        self._states: dict[str, RequestState] = {}
        self._next: dict[str, Compaction] = {}  # next compactions of requests that have begun, oldest request first
        self._orders: dict[str, CompactionOrder] = {}  # orders of the current step
        self._ended: set[str] = set()  # finished requests whose state is still kept
        self._refusals = Refusals(self)
        self._stats_counter = StatsCounter()
        self._reads_images_as_a_whole = reads_images_as_a_whole(self.vllm_config)
        most = self.max_num_scheduled_tokens
        self._longest_chunk = min(self.scheduler_config.long_prefill_token_threshold or most, most)
        in_use = self._cpu_memory.blocks_in_use if self._cpu_memory is not None else tuple
        self._room = Room(self, self._capacity, self._next, self._stats_counter, in_use)
        self._reports_stats = self.settings.metrics and self.log_stats
        if self._reports_stats and "l2kv" not in (envs.VLLM_PLUGINS or ()):
            raise ValueError(
                "additional_config['l2kv']['metrics'] needs vllm-l2kv's API server, since vLLM's own fails on these "
                "statistics: set VLLM_PLUGINS=l2kv, or leave metrics out."
            )

    def _with_bounds(self, connector: Any) -> ExternalHits:
        """Wraps the KV connector, so that requests take only rows before their first compaction from it."""
        if self._tails:
            raise ValueError(
                "vllm-l2kv does not support KV connectors with models that have sliding windows, chunks or recurrent "
                "layers beside full attention (drop --kv-transfer-config)."
            )
        if self.vllm_config.kv_transfer_config.kv_connector == TRANSFERRING:
            return Transfers(connector, self._external_bound, self.kv_cache_config, self.vllm_config)
        if not isinstance(connector, SimpleCPUOffloadConnector):
            return ExternalHits(connector, self._external_bound)
        self._cpu_memory = CPUMemory(connector, self._external_bound, self._shared, self.kv_cache_manager.block_pool)
        return self._cpu_memory

    def add_request(self, request: Request) -> None:
        """Same contract as upstream; also reads the request's `kv_` fields.

        A bad value fails only this request. The server and `compression()` refuse bad values before they get here.
        """
        # vLLM accepts the id of a request that has just finished again, even before a step reports its end.
        self._forget((request.request_id,))
        if request.resumable or request.request_id in self.requests:
            self._add_chunk(request)
            return
        if self._refusals.of_failed_session(request.request_id) is not None:
            self._refusals.end_sessions((request.request_id,))
            return
        try:
            state = self._state_of(request, self._read_fields(request))
        except (ParamError, DoesNotFitError) as error:
            self._refuse(request.request_id, str(error))
        else:
            if state is not None:
                self._states[request.request_id] = state
        super().add_request(request)

    def _add_chunk(self, request: Request) -> None:
        """Adds a chunk of a streaming-input session, or the request that ends it: not resumable, without fields.

        A session is not compressed, since its next chunk is computed on the whole cache. A chunk that asks for
        compression fails the session.
        """
        req_id = request.request_id
        if request.resumable:
            try:
                asked = self._read_fields(request)
                check_session(asked)
                session = self.requests.get(req_id)
                num_prompt_tokens = request.num_prompt_tokens + (session.num_tokens if session else 0)
                request.max_tokens = self._capacity.max_tokens(num_prompt_tokens, request.max_tokens, None)
            except (ParamError, DoesNotFitError) as error:
                self._refuse(req_id, str(error))
            else:
                failed = self._refusals.of_failed_session(req_id)
                if failed is not None:
                    self._refuse(req_id, failed)
                elif asked.reports:
                    reason = KeptWhole.SESSION if asked.params.compresses else None
                    self._states[req_id] = RequestState(session or request, self._capacity, None, reason)
        super().add_request(request)

    def finish_requests(self, request_ids: Any, *args: Any, **kwargs: Any) -> list[Request]:
        """Same contract as upstream; also ends sessions that have failed."""
        if request_ids is not None:
            request_ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        self._refusals.end_sessions(request_ids)
        return super().finish_requests(request_ids, *args, **kwargs)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Plans compactions, then schedules as vLLM does; the step's output carries the orders."""
        self._orders = {}
        self._compact_due()
        output = super().schedule(*args, **kwargs)
        # Orders of requests that vLLM preempted in this step are gone by now, see `_preempt_request`.
        if self._orders:
            attach_orders(output, tuple(self._orders.values()))
            for order in self._orders.values():
                self._publish(order)
        for manager in self._recurrent:
            manager.drop_states()
        if self._states:
            self._note_hits(output)
        self._ended |= output.finished_req_ids
        self._forget_ended()
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """Same contract as upstream; also adds usage to the outputs of requests that report it.

        To every output, not only the last one: when the front end ends a request at a stop string, the engine core
        sends no last output.
        """
        self._stats_counter.measured(seconds_of(model_runner_output))
        refused = self._refusals.about_to_fail(self.requests)
        outputs_of_clients = super().update_from_output(scheduler_output, model_runner_output)
        self._refusals.explain(refused, outputs_of_clients)
        self._forget_ended()
        if self._states:
            for outputs in outputs_of_clients.values():
                for output in outputs.outputs:
                    state = self._states.get(output.request_id)
                    if state is not None:
                        attach_usage(output, state.usage())
        return outputs_of_clients

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Same contract as upstream: that of `Scheduler` without async scheduling, else that of `AsyncScheduler`."""
        if self.scheduler_config.async_scheduling:
            super()._update_after_schedule(scheduler_output)
        else:
            super(AsyncScheduler, self)._update_after_schedule(scheduler_output)

    def _update_request_with_output(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Same contract as upstream: that of `Scheduler` without async scheduling, else that of `AsyncScheduler`."""
        if self.scheduler_config.async_scheduling:
            return super()._update_request_with_output(request, *args, **kwargs)
        return super(AsyncScheduler, self)._update_request_with_output(request, *args, **kwargs)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Same contract as upstream, with the statistics of compactions attached."""
        stats = super().make_stats(*args, **kwargs)
        counted = self._stats_counter.take()
        if stats is not None and self._reports_stats:
            counted.logical_tokens = sum(request.num_computed_tokens for request in self.running)
            evicted = self._compressed[0].num_evicted  # includes requests that still load rows and do not run
            counted.physical_tokens = counted.logical_tokens - sum(evicted.get(r.request_id, 0) for r in self.running)
            if counted.logical_tokens:
                counted.memory_ratio = self._capacity.memory_ratio(counted.logical_tokens, counted.physical_tokens)
            attach_stats(stats, counted)
        return stats

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Same contract as upstream; vLLM calls this whenever a request begins, also again after a preemption.

        A compacted prefix of the prompt is a hit of all its tokens. It is longer than any other hit, since those end
        before the first compaction. A prefix in CPU memory is no local hit: vLLM asks the connector for it next.
        """
        state, hit = self._states.get(request.request_id), None
        if state is not None and state.points is not None:
            self._begin(state, state.points, None)
            if self._cpu_memory is not None:
                self._cpu_memory.choose(request.request_id, None)
            hit = self._find_compacted(state, state.points) or self._find_in_cpu_memory(state, state.points)
        return hit or self._find_whole(request, *args, **kwargs)

    def _find_compacted(self, state: RequestState, points: CompactionPoints) -> Any:
        """A request's hit on compacted rows, in vLLM's form; `None` if there is none, or a longer one in CPU memory."""
        request, manager = state.request, self.kv_cache_manager
        found = self._shared.find(state.prefixes) if manager.prefix_cache_lookup_enabled(request) else None
        if found is None:
            return None
        prefix, blocks = found
        if self._would_cross(request, prefix.compaction.position, points.after(prefix.compaction)):
            return None
        num_rows = points.max_rows(self._max_num_computed(request), prefix.compaction)
        num_held = self._capacity.num_held(request.num_tokens, num_rows) + self._shared.num_partial_blocks(prefix)
        if num_held > self._capacity.num_blocks:
            return None  # the request would need a copy of each partly filled block, and could never be admitted
        if self._cpu_memory is not None and self._cpu_memory.find(state.prefixes, prefix.compaction.position):
            return None
        self._begin(state, points, prefix.compaction)
        if self._reports_hits(request):
            self._shared.announce(request, prefix)
        return manager.create_kv_cache_blocks(blocks), prefix.compaction.position, 0, False

    def _find_in_cpu_memory(self, state: RequestState, points: CompactionPoints) -> Any:
        """An empty hit, in vLLM's form, if the connector is to load a compacted prefix for a request; else `None`."""
        request, manager, memory = state.request, self.kv_cache_manager, self._cpu_memory
        if memory is None or not manager.prefix_cache_lookup_enabled(request):
            return None
        prefix = memory.find(state.prefixes, 0)
        if prefix is None:
            return None
        memory.choose(request.request_id, prefix)
        self._begin(state, points, prefix.compaction)
        return manager.empty_kv_cache_blocks, 0, 0, False

    def _external_bound(self, request: Request) -> int:
        """Tokens of its prompt that a request may take uncompacted from a KV connector.

        All tokens, if the first compaction is at the end of the prompt: vLLM computes the last token again.
        """
        state, coming = self._states.get(request.request_id), self._next.get(request.request_id)
        if state is not None and state.begins_with is not None:
            return 0
        if coming is None or coming.position >= request.num_tokens:
            return request.num_tokens
        return coming.position - 1

    def _update_waiting_for_remote_kv(self, request: Request) -> None:
        """Same contract as upstream, called when a connector has loaded rows; publishes a loaded compacted prefix."""
        super()._update_waiting_for_remote_kv(request)
        memory = self._cpu_memory
        prefix = memory.take_loaded(request.request_id) if memory is not None else None
        if memory is not None and prefix is not None:
            self._shared.publish(request, prefix, memory.blocks_in_use())

    def _reports_hits(self, request: Request) -> bool:
        """Whether a request wants KV events of its hits."""
        return request.kv_cache_report_mode == "full" and self.kv_cache_manager.enable_kv_cache_events

    def _find_whole(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """A request's hit on uncompacted rows, in vLLM's form.

        If the request wants KV events of its hits, `announce_hit` emits them instead of vLLM.
        """
        mode, is_reported = request.kv_cache_report_mode, self._reports_hits(request)
        request.kv_cache_report_mode = "incremental"
        try:
            blocks, num_tokens, *others = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        finally:
            request.kv_cache_report_mode = mode
        coordinator = self.kv_cache_manager.coordinator
        usable = self._usable_hit(request, num_tokens) if num_tokens else 0
        asked = None
        while usable < num_tokens or (asked != num_tokens and self._is_cut(num_tokens)):
            asked = min(usable, num_tokens)
            found, num_tokens, *_ = coordinator.find_longest_cache_hit(request.block_hashes, asked)
            blocks = self.kv_cache_manager.create_kv_cache_blocks(found)
        if is_reported:
            for manager in coordinator.single_type_managers:
                announce_hit(manager, request, num_tokens)
        return blocks, num_tokens, *others

    def _is_cut(self, num_tokens: int) -> bool:
        """Whether a hit may end inside a block of full attention because a window or a state ends it there.

        Another request may be computing this block in this very step, so a copy of it would come too early. What is
        findable up to a boundary inside a block is of earlier steps: a hit that was asked to end there is safe.
        """
        return bool(self._tails) and any(num_tokens % layer.block_size for layer in self._layers)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Same contract as upstream, called for each chunk of tokens: ends it at the request's next compaction."""
        coming, is_running = self._next.get(request.request_id), request.status is RequestStatus.RUNNING
        if coming is None and is_running and num_new_tokens > 0:
            # A shortcut, since this runs for every request at every step. Upstream would return another number only
            # for chains of draft modules, which are refused.
            return num_new_tokens
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if not is_running and self._room.would_lack(request, coming, num_computed_tokens):
            return 0
        if coming is None:
            return num_new_tokens
        limit = coming.position - num_computed_tokens
        if num_new_tokens > limit and not is_running and self._is_padded(request, num_computed_tokens):
            # vLLM takes all of a padded request's tokens or none. It does not pad a request that runs alone.
            return 0
        return min(num_new_tokens, limit)

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Same contract as upstream, called for each chunk of a request with images; ends none inside a whole image.

        Upstream does if the chunk begins at the image's first token, as after a compaction there, and the step has too
        few tokens left. Here the request waits for another step.
        """
        if self._reads_images_as_a_whole and num_computed_tokens < request.num_prompt_tokens:
            image = image_around(self._whole_images(request), num_computed_tokens + num_new_tokens)
            # An image that is longer than a chunk may be would wait for ever.
            if image is not None and image[1] - image[0] < self._longest_chunk:
                num_new_tokens = max(image[0] - num_computed_tokens, 0)
        return super()._try_schedule_encoder_inputs(request, num_computed_tokens, num_new_tokens, *args, **kwargs)

    def _is_padded(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether vLLM pads a request that begins with this many computed tokens with placeholder draft tokens.

        Padding keeps decode batches uniform. The model may accept such draft tokens.
        """
        return self.num_spec_tokens > 0 and request.num_tokens - num_computed_tokens == 1

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Same contract as upstream; also cancels the request's order, whose blocks other requests may hold by now."""
        super()._preempt_request(request, *args, **kwargs)
        self._orders.pop(request.request_id, None)
        self._next.pop(request.request_id, None)

    def _ec_transfer_pending(self, request: Request, num_computed_tokens: int) -> bool:
        """Same contract as upstream: vLLM asks whenever a request begins whether to skip it in this step.

        A request is also skipped while another one computes a prefix that it could begin on; requests after it in the
        queue do not wait. A refused request is skipped until it fails, so that it generates no token.
        """
        if self._refusals.is_about_to_fail(request.request_id) or self._is_computed_by_another(request):
            return True
        return super()._ec_transfer_pending(request, num_computed_tokens)

    def _is_computed_by_another(self, request: Request) -> bool:
        """Whether a running request is about to publish a longer compacted prefix of the prompt than was found.

        If not, `request` is noted as the one that computes it.
        """
        state = self._states.get(request.request_id)
        if state is None or not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return False
        begin = 0 if state.begins_with is None else state.begins_with.position
        for prefix in state.prefixes.to_publish:
            if prefix.compaction.position > begin:
                other = self._shared.computed_by(prefix)
                if other is not None and other != request.request_id and self._will_publish(other, prefix.compaction):
                    return True
                self._shared.computes(request.request_id, prefix)
        return False

    def _will_publish(self, req_id: str, compaction: Compaction) -> bool:
        """Whether a running request has this compaction ahead of it, or carries it out in this step."""
        request, coming = self.requests.get(req_id), self._next.get(req_id)
        if request is None or request.status != RequestStatus.RUNNING:
            return False
        return req_id in self._orders or (coming is not None and coming.position <= compaction.position)

    def _usable_hit(self, request: Request, num_tokens: int) -> int:
        """How many tokens of an uncompacted prefix-cache hit a request may begin with."""
        first = self._next.get(request.request_id)
        if first is not None:
            num_tokens = min(num_tokens, first.position - 1)  # at least one step comes before the compaction
        if self._would_cross(request, num_tokens, first):
            num_tokens -= 1
        num_rows = self._compressed[0].max_rows.get(request.request_id, request.num_tokens)
        if self._capacity.num_held(request.num_tokens, num_rows) >= self._capacity.num_blocks:
            num_tokens -= num_tokens % self.block_size  # a hit inside a block needs another block, for a copy
        return num_tokens

    def _would_cross(self, request: Request, num_computed_tokens: int, coming: Compaction | None) -> bool:
        """Whether placeholder draft tokens of a request would go beyond its next compaction if it begins here."""
        if coming is None or not self._is_padded(request, num_computed_tokens):
            return False
        return coming.position <= num_computed_tokens + self.num_spec_tokens

    def _begin(self, state: RequestState, points: CompactionPoints, last: Compaction | None) -> None:
        """Notes where a request begins if it is admitted: after `last`, whose rows it found, or at its first token."""
        req_id, coming = state.request.request_id, points.after(last)
        state.begins_with = last
        self._next.pop(req_id, None)
        if coming is not None:
            self._next[req_id] = coming
        max_rows = points.max_rows(self._max_num_computed(state.request), last)
        for manager in self._compressed:
            manager.max_rows[req_id] = max_rows
        sharing: list[LayerManager | TailManager] = [*self._layers, *self._tails]
        for layer in sharing:
            layer.compacted_hits.pop(req_id, None)
            if last is not None:
                layer.compacted_hits[req_id] = last.num_evicted

    def _max_num_computed(self, request: Request) -> int:
        """Tokens that a request computes if its answer reaches `max_tokens`: all but the last one."""
        return request.num_prompt_tokens + request.max_tokens - 1

    def _note_hits(self, output: SchedulerOutput) -> None:
        """Attaches the requests that begin on compacted rows in this step to the output for the worker."""
        hits = {}
        for req_id in (
            *(new.req_id for new in output.scheduled_new_reqs),
            *output.scheduled_cached_reqs.resumed_req_ids,
        ):
            state = self._states.get(req_id)
            if state is None or state.points is None:
                continue
            found = state.begins_with
            if found is not None:
                hits[req_id] = found.num_evicted
                self._note_compressed(state)
            if state.num_found is None:
                state.num_found = 0 if found is None else found.position
                self._stats_counter.found(state.num_found)
        if hits:
            attach_compacted_hits(output, hits)

    def _note_compressed(self, state: RequestState) -> None:
        if not state.is_counted:
            self._stats_counter.compressed()
            state.is_counted = True

    def _publish(self, order: CompactionOrder) -> None:
        """Adds the kept rows of a compaction to the prefix cache, if later requests are likely to use them.

        Called once it is certain that the worker will carry out the order.
        """
        request, memory = self._states[order.req_id].request, self._cpu_memory
        in_use = memory.blocks_in_use() if memory is not None else ()
        for prefix in self._published_by(order):
            if self._shared.publish(request, prefix, in_use):
                self._stats_counter.published()
                if memory is not None:
                    memory.store(prefix)

    def _published_by(self, order: CompactionOrder) -> list[Prefix]:
        """The prefixes, at most one, whose rows a compaction leaves for later requests."""
        prefixes = self._states[order.req_id].prefixes.to_publish
        return [prefix for prefix in prefixes if prefix.compaction.num_evicted == order.num_evicted]

    def _compact_due(self) -> None:
        """Compacts every request that has reached its next compaction."""
        released: list[KVCacheBlock] = []
        superseded: list[KVCacheBlock] = []
        for req_id, coming in list(self._next.items()):
            request = self.requests.get(req_id)  # None: finished since the last step
            if request is None or not self._is_due(request, coming):
                continue
            # More blocks become free with the next step if blocks are being copied or other requests were compacted.
            room_is_coming = bool(released or superseded or self.deferred_frees)
            if self._room.find(request, coming, room_is_coming):
                blocks = self._compact(request, coming)
                (superseded if self._leads_to_publication(coming, req_id) else released).extend(blocks)
        pool = self.kv_cache_manager.block_pool
        num_free = pool.get_num_free_blocks()
        # Last blocks first: the pool evicts in this order, so the first blocks of prompts stay cached longest.
        pool.free_blocks(reversed(released))
        # Requests with the same params use the published prefix instead, which takes fewer blocks.
        self._superseded.free(reversed(superseded))
        self._stats_counter.freed(pool.get_num_free_blocks() - num_free)
        self._keep_states()

    def _keep_states(self) -> None:
        """Keeps the states of recurrent layers at compactions whose rows will be published, if there are blocks."""
        if not self._recurrent:
            return
        pool = self.kv_cache_manager.block_pool
        for order in self._orders.values():
            for prefix in self._published_by(order):
                if pool.get_num_free_blocks() >= len(self._recurrent) and not self._shared.is_complete(prefix, pool):
                    for manager in self._recurrent:
                        manager.keep_state(order.req_id, prefix.compaction.position)

    def _is_due(self, request: Request, coming: Compaction) -> bool:
        """Whether all tokens up to the compaction have been scheduled and another step will follow.

        Steps may be in flight whose tokens are not known yet. Each step that reaches the end of the prompt gives one
        token.

        vLLM counts the draft tokens of a step in flight as computed, and subtracts those that the model rejects. Such
        a request has more than one placeholder, so its number of computed tokens is not certain, and the compaction
        waits for that step.
        """
        if self.num_spec_tokens and request.num_output_placeholders > 1:
            return False
        under_way = request.num_computed_tokens - request.num_prompt_tokens + 1
        scheduled_output = max(request.num_output_tokens, under_way)
        return (
            request.status == RequestStatus.RUNNING
            and request.num_computed_tokens == coming.position
            and scheduled_output < request.max_tokens
        )

    def _leads_to_publication(self, compaction: Compaction, req_id: str) -> bool:
        """Whether the rows of this compaction, or of a later one of the same prompt, will be published."""
        to_publish = self._states[req_id].prefixes.to_publish
        return any(prefix.compaction.position >= compaction.position for prefix in to_publish)

    def _compact(self, request: Request, coming: Compaction) -> list[KVCacheBlock]:
        """Compacts one request for which there are blocks: into free blocks if possible, else in place.

        Also in place if the rows will be published and taking free blocks would evict cached ones: later requests find
        the published rows instead of the request's full blocks.

        Returns:
            Blocks to be freed once every order of this step has its blocks.
        """
        req_id, in_place = request.request_id, not self._room.has_free_blocks(coming)
        if self._leads_to_publication(coming, req_id) and self._superseded.would_evict(
            self._room.num_destination_blocks(coming)
        ):
            in_place = self._room.fits_in_place(request, coming)
        state = self._states[req_id]
        assert state.points is not None
        # Tokens before the first compaction are computed on the full cache: the last chance to cache their blocks.
        # A token in flight has no hash yet.
        self.kv_cache_manager.cache_blocks(request, min(coming.position, request.num_tokens))
        moves, released = [], []
        for manager in self._compressed:
            move, blocks = manager.compact(req_id, coming.num_evicted, coming.num_keep, in_place)
            moves.append(move)
            released.extend(blocks)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            stop_prefix_caching(manager, req_id)
        self._orders[req_id] = CompactionOrder(
            req_id=req_id,
            num_rows=coming.num_rows,
            num_keep=coming.num_keep,
            num_evicted=coming.num_evicted,
            params=state.points.params,
            moves=tuple(moves),
        )
        following = state.points.after(coming)
        if following is None:
            del self._next[req_id]
        else:
            self._next[req_id] = following
        self._stats_counter.compacted(coming, 0 if in_place else self._room.num_destination_blocks(coming))
        self._note_compressed(state)
        return released

    def _state_of(self, request: Request, asked: Asked) -> RequestState | None:
        """The state of a new request, whose `max_tokens` is lowered to what fits; `None` if it reports nothing.

        Raises:
            ParamError: The runner does not support the request's seed, no token follows its document, or a compaction
                would divide an image that must be computed as a whole.
            DoesNotFitError: The cache cannot hold the request.
        """
        num_prompt_tokens, params = request.num_prompt_tokens, asked.params
        points = CompactionPoints.of(num_prompt_tokens, params, self.settings.intervals, self._whole_images(request))
        reason = why_whole(num_prompt_tokens, params)
        if isinstance(self.connector, Transfers) and is_decoded_elsewhere(request):
            points, reason = None, KeptWhole.DECODED_ELSEWHERE if params.compresses else None
        if points is not None:
            sampling = request.sampling_params
            check_seed(sampling.seed if sampling and sampling.temperature > 0 else None, points)
            check_images(points)
        max_tokens = self._capacity.max_tokens(num_prompt_tokens, request.max_tokens, points)
        is_bounded = max_tokens < request.max_tokens
        request.max_tokens = max_tokens
        if not asked.reports and not is_bounded:
            return None
        state = RequestState(request, self._capacity, points, reason, max_tokens if is_bounded else None)
        if points is not None:
            state.prefixes = self._shared.of(request, points)
        return state

    def _whole_images(self, request: Request) -> Images:
        """First and last positions of images whose tokens attend to each other."""
        if not self._reads_images_as_a_whole:
            return ()
        images = (feature for feature in request.mm_features if feature.modality in ("image", "video"))
        return tuple((first, last) for image in images for first, last in image.mm_position.extract_embeds_range())

    def _read_fields(self, request: Request) -> Asked:
        """Reads a request's fields. Checked here too, since an offline engine has no server that checks them.

        Raises:
            ParamError: A value is out of bounds, or a name that starts with `kv_` is unknown.
        """
        extra_args = request.sampling_params.extra_args if request.sampling_params else None
        return self.settings.read(extra_args)

    def _refuse(self, req_id: str, sentence: str) -> None:
        logger.error("Request %s is refused: %s", req_id, sentence)
        self._refusals.refuse(req_id, sentence)

    def _forget_ended(self) -> None:
        """Forgets ended requests, except those that vLLM still keeps because a KV connector writes their blocks."""
        if self._ended:
            self._forget(self._ended)
            self._ended &= self.requests.keys()

    def _forget(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            if req_id not in self.requests:
                self._refusals.forget((req_id,))
                state = self._states.pop(req_id, None)
                if state is not None:
                    self._shared.forget(req_id, state.prefixes.to_publish)
                self._next.pop(req_id, None)
                if self._cpu_memory is not None:
                    self._cpu_memory.forget(req_id)
                for manager in self._compressed:
                    manager.max_rows.pop(req_id, None)
