"""Any order of admissions, steps, aborts, preemptions and resets, against a worker that knows every row by name."""

import contextlib
import functools
import logging
import sys
from collections import Counter

import pytest
from cpu_copies import Copies, pinned
from fake_gpu import patch_vllm
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tail_shapes import STATE, specs
from v2_model import MAX_MODEL_LEN, RunnerV2Model
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec
from vllm.v1.request import RequestStatus
from vllm.v1.worker.gpu import buffer_utils
from worker_model import STOP, Rule, Tokens, WorkerModel

from vllm_l2kv import refusals
from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.messages.orders import compacted_hits_of, orders_of
from vllm_l2kv.scheduler.cache_manager import CompressedLayerManager, RecurrentLayerManager, TailManager
from vllm_l2kv.scheduler.integrity import check_block_conservation, check_nothing_left, check_requests

BLOCK_SIZE = 4
MAX_PROMPT, MAX_TOKENS = 64, 20
LONGEST_TURN = MAX_MODEL_LEN - MAX_TOKENS - 8
NO_BOUND = MAX_TOKENS + 1
"""Length of an answer that is all the rest of the context."""
POOL_SIZES = (16, 24, 40)
"""Blocks. A context of 96 tokens takes 24 blocks of 4 in one group, and 12 of 8 in the other."""
FULL = (
    {"full_layers": (0,)},
    {"full_layers": ()},
    {"full_layers": (), "full_heads": ((2, (1,)),)},
    {"full_layers": (0,), "full_heads": ((1, (0,)), (2, (1,)))},
)
"""Of three layers with two heads. Their blocks hold 8, 20 and 4 tokens, the others' 4, and 8 beside the last."""
STEPS = (
    {"depth": 1},
    {"depth": 2},
    {"depth": 2, "is_async": False, "pipeline_parallel_size": 2},
    {"depth": 3, "pipeline_parallel_size": 2},
)
"""Steps in flight, as vLLM has them without and with async scheduling, the last two with pipeline parallelism."""
NGRAMS = (("method", "ngram"), ("num_speculative_tokens", 3), ("prompt_lookup_min", 1), ("prompt_lookup_max", 2))
MODEL = (("method", "draft_model"), ("num_speculative_tokens", 2))
"""A model also has slots for what it writes ahead."""
INTERVALS = ((9, 4), (3, 8), (30, 12), (2, 1))
"""Of prompts and answers. A group of the smallest pool holds 64 rows."""
SQUEEZE = "another holder"
ENOUGH = Counter(
    {
        "published": 100,
        "hits": 35,
        "copied tails": 20,
        "preempted after a hit": 1,
        "resumed on compacted rows": 1,
        "passed over": 150,
        "turns": 1,
    }
)
"""What all histories of the quick profile must see of shared rows at least.

Well below what a run sees, since runs differ: Hypothesis also draws from the constants of all imported modules.
"""

REFUSED = 7  # a keep ratio
DOCUMENTS = (13, 16, 30)

fields = st.fixed_dictionaries(
    {
        "kv_keep_ratio": st.sampled_from([None, 0.5, 1.0, 0.05, 0.3, 0.9, REFUSED]),
        "kv_max_tokens": st.sampled_from([None, 12, 5, 20, 33]),
    },
    optional={
        "kv_protect_first": st.integers(0, 5),
        "kv_protect_last": st.integers(0, 5),
        "kv_prefix_tokens": st.sampled_from([*DOCUMENTS, 1, 5, MAX_PROMPT]),
    },
)
askers = st.fixed_dictionaries(
    {
        "kv_keep_ratio": st.sampled_from([0.5, 0.3]),
        "kv_max_tokens": st.sampled_from([None, None, 12]),
        "kv_protect_first": st.just(1),
        "kv_protect_last": st.sampled_from([0, 2]),
        "kv_prefix_tokens": st.sampled_from(DOCUMENTS),
    }
)
"""Fields of requests that often ask for the same document in the same way."""


class SchedulerMachine(RuleBasedStateMachine):
    """One engine's life. A pool of little more than the longest request makes vLLM preempt all the time."""

    steps = STEPS
    drafters = ((),)

    def __init__(self, make_harness, seen: Counter, **arguments) -> None:
        super().__init__()
        self.make_harness = make_harness
        self.arguments = arguments
        self.seen = seen  # what happened, in all histories
        self.asked: dict[str, dict] = {}  # what of a request a later turn repeats
        self.preempted: set[str] = set()
        self.begun_on_hits: set[str] = set()
        self.expected: dict[str, list[int] | None] = {}  # answers, or `None` for a refusal, of all that is not aborted
        self.told: dict[str, int] = {}  # compacted requests that the worker knows of
        self.gone: list[str] = []  # finished request ids
        self.is_offloading = "cpu_blocks" in arguments
        self.copies = Copies()

    @initialize(
        data=st.data(),
        num_blocks=st.sampled_from(POOL_SIZES),
        full=st.sampled_from(FULL),
        runner_v2=st.booleans(),
        intervals=st.sampled_from(INTERVALS),
        default_budget=st.sampled_from([None, 10]),
    )
    def start(self, data, num_blocks, full, runner_v2, intervals, default_budget) -> None:
        self.num_blocks = num_blocks
        full = {} if "specs" in self.arguments else full
        steps, drafter = data.draw(st.sampled_from(self.steps)), data.draw(st.sampled_from(self.drafters))
        self.num_ahead = dict(drafter).get("num_speculative_tokens", 0) * (steps["depth"] + (drafter == MODEL))
        self.harness = self.make_harness(
            num_blocks,
            **steps,
            **full,
            num_layers=3,
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=16,
            max_num_seqs=6,
            max_model_len=MAX_MODEL_LEN,
            prompt_interval=intervals[0],
            answer_interval=intervals[1],
            default_max_tokens=default_budget,
            drafter=drafter,
            **self.arguments,
        )
        self.scheduler = self.harness.scheduler
        self.scheduler.use_v2_model_runner = runner_v2  # resumed requests come to the worker as new ones
        self._count_waits()
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.compressed = [manager for manager in self.managers if isinstance(manager, CompressedLayerManager)]
        groups = (
            [manager.block_size for manager in self.managers],
            {manager.kv_cache_group_id for manager in self.compressed},
            {
                manager.kv_cache_group_id: functools.partial(passed, manager.kv_cache_spec)
                for manager in self.managers
                if isinstance(manager, TailManager)
            },
            {manager.kv_cache_group_id for manager in self.managers if isinstance(manager, RecurrentLayerManager)},
        )
        self.worker = RunnerV2Model(*groups, steps["depth"]) if runner_v2 else WorkerModel(*groups)
        self.harness.execute = self.worker.execute
        self.copies.memory, self.copies.loaded = self.worker._memory, self.worker.copied
        if self.is_offloading:
            self.harness.transfer = self.copies.transfer

    @rule(
        document=st.integers(1, 2),
        num_shared=st.integers(1, MAX_PROMPT),
        num_own=st.integers(0, 6),
        kv_fields=st.one_of(fields, askers),
        max_tokens=st.sampled_from([*range(1, MAX_TOKENS + 1), NO_BOUND, NO_BOUND]),
        stop_after=st.none() | st.integers(0, MAX_TOKENS),
        priority=st.integers(0, 2),
        reuse_id=st.booleans(),
        salt=st.sampled_from([None, None, "salt"]),
        skips_cache=st.sampled_from([False] * 7 + [True]),
        num_requests=st.integers(1, 3),
    )
    def admit(self, document, num_shared, num_own, num_requests, **about) -> None:
        for _ in range(num_requests):
            self._submit(([document] * num_shared + [document + 100] * num_own)[:MAX_PROMPT], **about)

    @precondition(lambda self: self._answered())
    @rule(data=st.data(), num_new=st.integers(1, 8), max_tokens=st.integers(1, MAX_TOKENS), priority=st.integers(0, 2))
    def ask_again(self, data, num_new, max_tokens, priority) -> None:
        """The next turn of a conversation."""
        req_id = data.draw(st.sampled_from(self._answered()))
        prompt = self.worker.tokens[req_id].prompt + self.expected[req_id] + [num_new] * num_new
        about = {"stop_after": None, "reuse_id": False, "skips_cache": False, "max_tokens": max_tokens}
        self._submit(prompt, priority=priority, **about, **self.asked[req_id])
        self.seen["turns"] += 1

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps) -> None:
        for _ in range(num_steps):
            if len(self.harness.in_flight) == self.harness.depth:
                self.finish_step()
            self.schedule_step()

    @precondition(lambda self: len(self.harness.in_flight) < self.harness.depth)
    @rule()
    def schedule_step(self) -> None:
        output = self.harness.schedule()
        self._check_step(output)
        self.check()

    @precondition(lambda self: self.harness.in_flight)
    @rule()
    def finish_step(self) -> None:
        self.harness.finish_one()
        self.check()

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data) -> None:
        req_id = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.scheduler.finish_requests(req_id, RequestStatus.FINISHED_ABORTED)
        self.expected.pop(req_id, None)
        self.gone.append(req_id)

    @precondition(lambda self: SQUEEZE not in self.compressed[0].req_to_blocks)
    @rule(running_too=st.booleans())
    def reset_prefix_cache(self, running_too) -> None:
        """With running requests, vLLM preempts all of them; without, it refuses unless it is idle.

        With a KV connector it raises an error where blocks are being copied.
        """
        with contextlib.suppress(RuntimeError) if self.is_offloading else contextlib.nullcontext():
            self.scheduler.reset_prefix_cache(reset_running_requests=running_too)

    @precondition(lambda self: self.harness.pool.get_num_free_blocks() > 0)
    @rule(share=st.floats(0.3, 1))
    def squeeze(self, share) -> None:
        """Another holder takes blocks of the pool: requests are preempted, and compactions wait or go in place."""
        pool = self.harness.pool
        self.compressed[0].req_to_blocks[SQUEEZE] += pool.get_new_blocks(round(share * pool.get_num_free_blocks()))

    @precondition(lambda self: SQUEEZE in self.compressed[0].req_to_blocks)
    @rule()
    def release(self) -> None:
        self.harness.pool.free_blocks(self.compressed[0].req_to_blocks.pop(SQUEEZE))

    @rule(state=st.sampled_from([PauseState.PAUSED_ALL, PauseState.PAUSED_NEW]), num_steps=st.integers(1, 3))
    def pause(self, state, num_steps) -> None:
        self.scheduler.set_pause_state(state)
        self.step(num_steps)
        self.scheduler.set_pause_state(PauseState.UNPAUSED)

    @invariant()
    def check(self) -> None:
        check_block_conservation(self.scheduler.kv_cache_manager, pinned(self.scheduler))
        self._check_tables()
        check_requests(self.scheduler)

    def teardown(self) -> None:
        """Whatever happened, everybody gets an answer, and nothing is left behind."""
        if hasattr(self, "worker"):
            self.seen.update(self.worker.drafts)
        if sys.exc_info()[0] is not None or not hasattr(self, "worker"):
            return
        if SQUEEZE in self.compressed[0].req_to_blocks:
            self.release()
        for _ in range(5000):
            if not self.scheduler.requests:
                break
            self.step(1)
        while self.harness.in_flight:
            self.finish_step()
        assert not self.scheduler.requests, "still unfinished"
        self.schedule_step()
        for req_id, answer in self.expected.items():
            assert (self.harness.finish_reasons[req_id] == "error") == (answer is None)
            assert answer is None or self.harness.outputs[req_id] == answer
        # An idle connector goes on storing what others may find.
        copied = pinned(self.scheduler)
        assert self.harness.pool.get_num_free_blocks() == self.num_blocks - len(set(copied))
        check_nothing_left(self.scheduler, copied)

    def _submit(self, prompt, kv_fields, max_tokens, stop_after, priority, reuse_id, salt, skips_cache) -> None:
        req_id, rule = self._free_id(reuse_id), self._rule(kv_fields)
        tokens = self.worker.tokens[req_id] = Tokens(prompt, stop_after, salt)
        self.asked[req_id] = {"kv_fields": kv_fields, "salt": salt}
        self.preempted.discard(req_id)
        self.harness.outputs[req_id] = []
        self.harness.finish_reasons.pop(req_id, None)
        max_tokens = MAX_MODEL_LEN - len(prompt) if max_tokens == NO_BOUND else max_tokens
        is_good = kv_fields["kv_keep_ratio"] != REFUSED and (rule.budget or 100) >= rule.first + rule.last
        is_good = is_good and (rule.document or 0) < len(prompt)
        bound = self._bound(rule, len(prompt), max_tokens) if is_good else None
        self.expected[req_id] = None if bound is None else tokens.answer(bound)
        self.worker.rules[req_id] = Rule() if bound is None else rule  # vLLM may still compute some of a refused one
        about = {"priority": priority, "cache_salt": salt, "skip_reading_prefix_cache": skips_cache}
        self.harness.submit(req_id, prompt, kv_fields, max_tokens, STOP, **about)

    def _rule(self, kv_fields) -> Rule:
        settings, ratio = self.scheduler.settings, kv_fields["kv_keep_ratio"]
        return Rule(
            "1" if ratio in (None, REFUSED) else str(ratio),
            kv_fields.get("kv_protect_first", settings.defaults.protect_first),
            kv_fields.get("kv_protect_last", settings.defaults.protect_last),
            kv_fields["kv_max_tokens"] or settings.defaults.max_tokens,
            *settings.intervals,
            kv_fields.get("kv_prefix_tokens"),
        )

    def _answered(self) -> list[str]:
        """Requests whose answer is whole, and with which a longer prompt has room in the context."""
        return [
            req_id
            for req_id, answer in sorted(self.expected.items())
            if answer is not None
            and self.harness.finish_reasons.get(req_id) in ("stop", "length")
            and len(self.worker.tokens[req_id].prompt) + len(answer) <= LONGEST_TURN
        ]

    def _bound(self, rule, num_prompt_tokens, max_tokens) -> int | None:
        """The longest answer for which there is room, if the request takes it; `None` if it is refused."""

        def fits(length: int) -> bool:
            num_tokens = num_prompt_tokens + length - 1
            num_rows = rule.most_rows(num_prompt_tokens, num_tokens)
            num_tokens = min(num_tokens + self.num_ahead, MAX_MODEL_LEN)
            num_rows = min(num_rows + self.num_ahead, num_tokens)
            of_group = [num_rows if manager in self.compressed else num_tokens for manager in self.managers]
            blocks = [num_blocks_for(n, manager.block_size) for n, manager in zip(of_group, self.managers, strict=True)]
            # Of windows, and of states: those of all steps under way, and the one before.
            caps = [
                1 + self.scheduler.vllm_config.max_concurrent_batches
                if isinstance(manager, RecurrentLayerManager)
                else manager.max_admission_blocks_per_request
                for manager in self.managers
            ]
            return sum(min(n, cap or n) for n, cap in zip(blocks, caps, strict=True)) <= self.num_blocks

        longest = max(filter(fits, range(1, max_tokens + 1)), default=0)
        takes_less = longest > 0 and num_prompt_tokens + max_tokens == MAX_MODEL_LEN
        return longest if takes_less or longest == max_tokens else None

    def _free_id(self, reuse: bool) -> str:
        """An id never used, or one that vLLM allows again: of a finished request with no step under way."""
        in_flight = {req_id for output in self.harness.in_flight for req_id in output.num_scheduled_tokens}
        in_flight |= {order.req_id for output in self.harness.in_flight for order in orders_of(output)}
        again = [req_id for req_id in self.gone if req_id not in in_flight and req_id not in self.scheduler.requests]
        return again[-1] if reuse and again else f"r{len(self.worker.tokens)}"

    def _check_tables(self) -> None:
        """Running requests hold as many blocks as their slots need, and so do those that load rows; others none."""
        running = {request.request_id: request for request in self.scheduler.running}
        loading = {
            req_id
            for req_id, request in self.scheduler.requests.items()
            if self.is_offloading and req_id not in running and request.num_computed_tokens > 0
        }
        for manager in self.managers:
            holders = {req_id for req_id, blocks in manager.req_to_blocks.items() if blocks}
            assert holders - {SQUEEZE} == running.keys() | loading
            num_evicted = manager.num_evicted if manager in self.compressed else {}
            assert set(num_evicted) <= holders
            for req_id, request in running.items():
                num_slots = request.num_computed_tokens - num_evicted.get(req_id, 0)
                num_held = len(manager.req_to_blocks[req_id])
                fewest, most = (num_blocks_for(num_slots + n, manager.block_size) for n in (0, self.num_ahead))
                assert fewest <= num_held <= most
                num_tokens = request.num_computed_tokens
                assert not manager.get_num_blocks_to_allocate(
                    req_id, num_tokens, (), num_tokens, num_tokens, num_tokens
                )

    def _check_step(self, output) -> None:
        """The worker hears of exactly those compactions that still stand, and nobody is passed over for good."""
        check_requests(self.scheduler)
        for req_id in (*output.finished_req_ids, *(output.preempted_req_ids or ())):
            self.told.pop(req_id, None)
        self._check_hits(output)
        for order in orders_of(output):
            assert self.scheduler.requests[order.req_id].status == RequestStatus.RUNNING
            assert order.num_evicted > self.told.get(order.req_id, 0)
            self.seen["compacted with drafts"] += self.num_ahead > 0
            self.told[order.req_id] = order.num_evicted
            for move in order.moves:
                blocks = self.managers[move.group_id].req_to_blocks[order.req_id]
                assert tuple(block.block_id for block in blocks[: len(move.destination)]) == move.destination
                held = pinned(self.scheduler)  # what others will find is copied as well, into CPU memory
                assert all(block.ref_cnt == 1 + held.count(block.block_id) for block in blocks)
                self.seen["published"] += blocks[0].block_hash is not None
        running = {request.request_id for request in self.scheduler.running}
        for manager in self.compressed:
            assert {req_id: n for req_id, n in manager.num_evicted.items() if req_id in running} == self.told

    def _count_waits(self) -> None:
        """Counts requests that are passed over while another computes what they ask for."""
        is_passed_over = self.scheduler._ec_transfer_pending

        def count(request, num_computed_tokens) -> bool:
            answer = is_passed_over(request, num_computed_tokens)
            self.seen["passed over"] += answer
            return answer

        self.scheduler._ec_transfer_pending = count

    def _check_hits(self, output) -> None:
        """Requests that begin on compacted rows are new or resumed, and their count is the one in use."""
        hits, resumed = compacted_hits_of(output), output.scheduled_cached_reqs.resumed_req_ids
        assert not hits.keys() & {order.req_id for order in orders_of(output)}
        assert hits.keys() <= {new.req_id for new in output.scheduled_new_reqs} | resumed
        self.told.update(hits)
        preempted = set(output.preempted_req_ids or ())
        copies = {copy.dst_block_id for copy in output.kv_cache_block_copies or ()}
        blocks = {block.block_id for manager in self.managers for req in hits for block in manager.req_to_blocks[req]}
        self.seen["hits"] += len(hits)
        self.seen["copied tails"] += len(copies & blocks)
        self.seen["resumed on compacted rows"] += len(hits.keys() & self.preempted)
        self.seen["preempted after a hit"] += len(preempted & self.begun_on_hits)
        self.begun_on_hits = (self.begun_on_hits - preempted) | hits.keys()
        self.preempted |= preempted


def passed(spec, num_tokens: int) -> int:
    """Tokens that the next one after so many does not see in a layer that holds the end of a context only."""
    if isinstance(spec, MambaSpec):
        return max(0, num_tokens - 1)
    if isinstance(spec, SlidingWindowSpec):
        return max(0, num_tokens + 1 - spec.sliding_window)
    return num_tokens - num_tokens % spec.attention_chunk_size


class TailMachine(SchedulerMachine):
    """In a model some of whose layers hold the end of a context only.

    Windows and states are sized by the steps in flight, and of the runner that vLLM plans for no more than two are.
    """

    steps = STEPS[:3]


class DraftingMachine(SchedulerMachine):
    """With speculative decoding, which is refused with pipeline parallelism."""

    steps = STEPS[:2]
    drafters = (NGRAMS, MODEL)


class OffloadingMachine(SchedulerMachine):
    """With CPU memory, into and from which blocks are copied in the background; refused with pipeline parallelism."""

    steps = STEPS[:2]

    @initialize(lag=st.sampled_from([0, 2, 6]), is_early=st.booleans())
    def start_copies(self, lag, is_early) -> None:
        self.copies.lag, self.copies.is_early = lag, is_early

    def _check_step(self, output) -> None:
        super()._check_step(output)
        for transfer in self.scheduler.connector._loading.values():
            self.seen["loading"] += transfer.status == RequestStatus.WAITING_FOR_REMOTE_KVS

    def teardown(self) -> None:
        super().teardown()
        self.seen["blocks stored"] += self.copies.num_stored
        self.seen["blocks loaded"] += self.copies.num_loaded


quick = settings(
    stateful_step_count=50,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
long = settings(quick, max_examples=2000, stateful_step_count=80, derandomize=False, print_blob=True)
profiles = [
    pytest.param(quick, id="quick"),
    pytest.param(long, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]


@pytest.fixture
def patched(caplog, monkeypatch):
    patch_vllm(monkeypatch)
    monkeypatch.setattr(buffer_utils, "_DEFAULT_MAX_CONCURRENCY", 2)  # each history sets its own
    caplog.set_level(logging.CRITICAL, logger="vllm")  # thousands of lines about resets and refusals


def run(make_machine, seen: Counter, profile, num_quick: int, enough: Counter) -> None:
    """Runs histories, `num_quick` in the quick profile, in which all that is named must have been seen."""
    is_quick = profile is quick
    run_state_machine_as_test(make_machine, settings=settings(quick, max_examples=num_quick) if is_quick else profile)
    if is_quick:
        assert seen >= enough, f"only {seen}"


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("profile", profiles)
def test_every_request_finds_its_own_rows_whatever_happens(make_harness, policy, profile, patched):
    seen: Counter[str] = Counter()
    run(lambda: SchedulerMachine(make_harness, seen, scheduling_policy=policy), seen, profile, 160, ENOUGH)


TAILS = {
    "a short window": {"specs": specs((6, None), BLOCK_SIZE), "full_layers": ()},
    "a full layer, short and long windows": {
        "specs": specs((6, None, 33, None, 6, None), BLOCK_SIZE),
        "full_layers": (1,),
    },
    "chunks": {"specs": specs(((8,), None), BLOCK_SIZE), "full_layers": ()},
    "states": {"specs": specs((STATE, None, STATE, None), BLOCK_SIZE), "full_layers": ()},
    "states, and a full layer in larger blocks": {"specs": specs((STATE, None) * 3, BLOCK_SIZE), "full_layers": (1,)},
    "more states than rows": {"specs": specs((STATE, STATE, STATE, None), BLOCK_SIZE), "full_layers": ()},
}


@pytest.mark.parametrize("model", TAILS)
@pytest.mark.parametrize("profile", profiles)
def test_rows_in_windows_and_states(make_harness, model, profile, patched):
    """Small pools have room for few copies of states, so fewer documents are found."""
    seen: Counter[str] = Counter()
    enough = Counter({"published": 10, "hits": 1 if "states" in model else 4, "copied tails": 4})
    run(lambda: TailMachine(make_harness, seen, **TAILS[model]), seen, profile, 40, enough)


@pytest.mark.parametrize("profile", profiles)
def test_drafts_leave_no_rows(make_harness, profile, patched):
    seen: Counter[str] = Counter()
    enough = Counter({"accepted": 1, "rejected": 1, "compacted with drafts": 1})
    run(lambda: DraftingMachine(make_harness, seen), seen, profile, 60, enough)


@pytest.mark.parametrize("profile", profiles)
def test_rows_come_back_from_cpu_memory(make_harness, profile, patched, monkeypatch):
    monkeypatch.setitem(refusals.CONNECTORS, "CPUs", ("SimpleCPUOffloadConnector",))
    seen: Counter[str] = Counter()
    cpu_blocks = max(POOL_SIZES) + 1  # it may not be less than the largest cache
    enough = Counter({"blocks stored": 200, "blocks loaded": 40, "loading": 20, "published": 60})
    run(lambda: OffloadingMachine(make_harness, seen, cpu_blocks=cpu_blocks), seen, profile, 80, enough)
