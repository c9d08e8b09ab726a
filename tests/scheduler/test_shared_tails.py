"""Documents in models some of whose layers hold the end of a context only: a window, a chunk, or a state.

`test_state_machine.py` has them in any order of events; here is what one trap each looks like.
"""

import itertools
from typing import Any

import pytest
from tail_shapes import STATE, specs
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.scheduler.cache_manager import TailManager
from vllm_l2kv.scheduler.integrity import check_nothing_left
from vllm_l2kv.scheduler.scheduler import L2KVScheduler

DOCUMENT = 100
SPARE = 400
"""Blocks of a pool in which nothing is short."""

MODELS: dict[str, dict[str, Any]] = {
    "a window": {"layers": (40, None, 40, None), "full_layers": ()},
    "a full layer in larger blocks": {"layers": (40, None, 40, None, 40, None), "full_layers": (1,)},
    "windows that are short, and longer than the document": {"layers": (17, None, 200, None), "full_layers": ()},
    "chunks": {"layers": ((64,), None, (64,), None), "full_layers": ()},
    "states": {"layers": (STATE, None, STATE, None), "full_layers": ()},
    "states, and a full layer in larger blocks": {"layers": (STATE, None) * 3, "full_layers": (1,)},
    "states and windows": {"layers": (STATE, 40, None, STATE, 40, None), "full_layers": ()},
}
"""A window of 40 tokens ends 100 tokens in blocks 3 to 6 of 16, a chunk of 64 in blocks 4 to 6."""


@pytest.fixture(params=[1, 2], ids=["sync", "async"])
def depth(request):
    return request.param


@pytest.fixture
def make(make_harness, depth):
    def make(model: str, num_blocks: int = SPARE, **arguments):
        layers, full_layers = MODELS[model].values()
        return make_harness(num_blocks, full_layers, depth, specs=specs(layers, 16), **arguments)

    return make


@pytest.fixture(params=MODELS)
def harness(make, request):
    return make(request.param)


def tails(harness) -> list[TailManager]:
    managers = harness.scheduler.kv_cache_manager.coordinator.single_type_managers
    return [manager for manager in managers if isinstance(manager, TailManager)]


def ask(
    harness, req_id: str, num_document=DOCUMENT, num_question: int = 10, num_tokens: int = 4, begin: int = 0, **about
):
    """A question unlike any other to a document whose first token is `begin`."""
    fields = {"kv_prefix_tokens": num_document, "kv_keep_ratio": 0.5, "kv_protect_first": 0, "kv_protect_last": 0}
    question = [10_000 + sum(req_id.encode())] * num_question
    return harness.submit(req_id, [*range(begin, begin + num_document), *question], fields, num_tokens, **about)


def found(harness, req_id: str, **about) -> int:
    """Tokens whose compacted rows a request finds, once it is answered."""
    ask(harness, req_id, **about)
    harness.run()
    return harness.usage[req_id]["found_tokens"]


def take_all(harness, num_left: int = 0) -> None:
    """Another holder takes the free blocks of the pool, so all that was findable in them is gone."""
    free = harness.pool.get_num_free_blocks() - num_left
    harness.compressed.req_to_blocks["another holder"] += harness.pool.get_new_blocks(free)


def give_back(harness) -> None:
    harness.pool.free_blocks(harness.compressed.req_to_blocks.pop("another holder"))


@pytest.mark.parametrize("num_document", [96, 100, 128, 129, 20])
def test_the_second_asker_computes_its_question(harness, num_document):
    assert found(harness, "first", num_document=num_document) == 0
    num_steps = len(harness.steps)
    assert found(harness, "second", num_document=num_document) == num_document
    (begin,) = [step for step in harness.steps[num_steps:] if step.scheduled_new_reqs]
    (new,) = begin.scheduled_new_reqs
    assert (new.num_computed_tokens, begin.num_scheduled_tokens["second"]) == (num_document, 10)
    managers = harness.scheduler.kv_cache_manager.coordinator.single_type_managers
    num_rows = [-(-num_document // 2) if manager is harness.compressed else num_document for manager in managers]
    partial = [rows % manager.block_size != 0 for rows, manager in zip(num_rows, managers, strict=True)]
    assert len(begin.kv_cache_block_copies or ()) == sum(partial)
    for manager in tails(harness):
        blocks = new.block_ids[manager.kv_cache_group_id]
        num_null = manager.get_num_skipped_tokens(num_document) // manager.block_size
        assert [block == 0 for block in blocks] == [i < num_null for i in range(len(blocks))]
        assert len(blocks) == num_blocks_for(num_document + 10, manager.block_size)
    assert {**harness.usage["first"], "found_tokens": num_document} == harness.usage["second"]


def test_another_salt_finds_nothing(harness):
    assert found(harness, "first") == 0
    assert found(harness, "second", cache_salt="another") == 0
    assert found(harness, "third", cache_salt="another") == DOCUMENT


def test_a_longer_document_is_another_one(harness):
    assert found(harness, "first") == 0
    assert found(harness, "second", num_document=DOCUMENT + 1) == 0
    assert found(harness, "third") == DOCUMENT


@pytest.mark.parametrize("model", ["windows that are short, and longer than the document", "states"])
def test_a_conversation_begins_at_its_last_compaction_in_the_earlier_prompt(make, model):
    """Of 96 tokens of the second window three blocks are from before the third compaction."""
    harness = make(model, prompt_interval=32, answer_interval=16)
    budget = {"kv_max_tokens": 64, "kv_protect_first": 0, "kv_protect_last": 0}
    prompt = list(range(300))  # compacted at 96, 128, 160, ..., 288
    harness.submit("turn 1", prompt, budget, 40)
    harness.run()
    prompt += [*harness.outputs["turn 1"], *range(3000, 3030)]
    harness.submit("turn 2", prompt, budget, 4)
    harness.run()
    assert harness.usage["turn 2"]["found_tokens"] == 288
    harness.submit("turn 3", [*prompt, *harness.outputs["turn 2"], 1], budget, 4)
    harness.run()
    assert harness.usage["turn 3"]["found_tokens"] == 352


def test_what_is_computed_on_found_rows_is_not_for_the_prefix_cache(harness):
    """Nor is what its first asker computes. Windows are asked alone: other groups would hide what they cache."""
    for req_id in ("first", "second"):
        request = ask(harness, req_id, num_question=200)
        harness.run()
        for manager in tails(harness):
            size = manager.block_size
            keys = [request.block_hashes[i] for i in range(DOCUMENT // size, request.num_tokens // size)]
            assert not any(harness.pool.get_cached_block(key, [manager.kv_cache_group_id]) for key in keys)
    assert harness.usage["second"]["found_tokens"] == DOCUMENT


def test_others_wait_for_a_document_that_is_computed(harness):
    ask(harness, "first")
    harness.step()
    ask(harness, "second")
    harness.run()
    assert harness.usage["second"]["found_tokens"] == DOCUMENT


class TestHolding:
    """The first asker frees blocks of a window as it goes on, and the rest of its document when it ends."""

    def begin(self, harness, num_tokens: int = 300) -> None:
        """Until the first asker is past the window, or the chunk, at the end of its document."""
        ask(harness, "first", num_tokens=num_tokens)
        harness.run_until(lambda: len(harness.outputs.get("first", ())) > 150, 300)
        assert all(len(manager.held["first"]) > 0 for manager in tails(harness))

    def test_a_window_stays_as_long_as_the_rest(self, make):
        harness = make("a window")
        self.begin(harness)
        table = tails(harness)[0].req_to_blocks["first"]
        assert all(block.is_null for block in table[: num_blocks_for(DOCUMENT, 16)])
        take_all(harness)
        give_back(harness)
        assert found(harness, "second") == DOCUMENT

    def test_it_is_not_the_first_to_go(self, make):
        """When the first asker has ended, its document is younger than what ended before."""
        harness = make("a window")
        self.begin(harness)
        _, groups = harness.scheduler._shared.find(harness.scheduler._states["first"].prefixes)
        document = {block.block_id for group in groups for block in group if not block.is_null}
        harness.submit("stranger", [5] * 64, {"kv_keep_ratio": 1.0}, 2)
        harness.run_until(lambda: "stranger" in harness.finish_reasons)
        harness.run()
        free = harness.pool.free_block_queue.get_all_free_blocks()
        findable = [block.block_id for block in free if block.block_hash is not None]
        assert len(findable) > len(document)
        assert set(findable[-len(document) :]) == document

    @pytest.mark.parametrize("model", MODELS)
    def test_a_running_request_gets_them_before_another_is_preempted(self, make, model):
        harness = make(model)
        self.begin(harness)
        take_all(harness)
        harness.run_until(lambda: not any(manager.held for manager in tails(harness)), 40)
        assert harness.preempted() == []
        give_back(harness)
        harness.run()
        check_nothing_left(harness.scheduler)

    @pytest.mark.parametrize("model", MODELS)
    def test_a_request_that_just_fits_ends(self, make, model):
        """What it holds for others is not in its size."""
        harness = make(model, max_num_batched_tokens=32, max_num_seqs=8)
        num_needed = harness.scheduler._capacity.num_held(DOCUMENT + 10 + 299, DOCUMENT + 10 + 299 - DOCUMENT // 2)
        harness = make(model, num_needed, max_num_batched_tokens=32, max_num_seqs=8)
        ask(harness, "first", num_tokens=300)
        harness.run(2000)
        assert harness.finish_reasons["first"] == "length"
        assert harness.preempted() == []
        check_nothing_left(harness.scheduler)

    def test_a_newcomer_need_not_wait_for_them(self, make):
        harness = make("a window")
        self.begin(harness)
        take_all(harness, num_left=2)
        harness.submit("newcomer", [5] * 32, None, 4)  # two blocks in each of two groups; four are held
        harness.step()
        assert harness.scheduler.requests["newcomer"].status == RequestStatus.RUNNING
        assert not any(manager.held for manager in tails(harness))
        assert harness.preempted() == []
        give_back(harness)
        harness.run()

    @pytest.mark.parametrize("end", ["abort", "preemption", "reset"])
    def test_an_end_of_another_kind(self, harness, end):
        self.begin(harness)
        scheduler: L2KVScheduler = harness.scheduler
        if end == "abort":
            scheduler.finish_requests("first", RequestStatus.FINISHED_ABORTED)
        elif end == "reset":
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
        else:
            scheduler.running.remove(scheduler.requests["first"])
            scheduler._preempt_request(scheduler.requests["first"], 0.0)
        assert not any(manager.held for manager in tails(harness))
        harness.run()
        check_nothing_left(scheduler)
        assert found(harness, "second") == DOCUMENT


def test_a_window_that_is_lost_is_a_document_that_is_lost(harness):
    """And the next copy takes what is left of it, without a row of compressed layers."""
    for number, manager in itertools.product(range(2), tails(harness)):
        found(harness, f"{number} {manager.kv_cache_group_id}")
        state_of = ask(harness, f"look {number} {manager.kv_cache_group_id}")
        prefixes = harness.scheduler._states[state_of.request_id].prefixes
        prefix, blocks = harness.scheduler._shared.find(prefixes)
        harness.run()
        held = [block for block in blocks[manager.kv_cache_group_id] if not block.is_null]
        harness.pool.evict_blocks({held[-number].block_id})
        assert not harness.scheduler._shared.is_complete(prefix, harness.pool)
        assert found(harness, f"again {number} {manager.kv_cache_group_id}") == 0
        assert found(harness, f"and again {number} {manager.kv_cache_group_id}") == DOCUMENT


class TestStates:
    """A step overwrites the state that the one before has left."""

    def test_a_state_is_copied_before_it_is_overwritten(self, make):
        """Even if the request computes nothing in the step of its compaction."""
        harness = make("states")
        scheduler: L2KVScheduler = harness.scheduler
        ask(harness, "first", num_document=100, num_question=40)
        harness.run_until(lambda: "first" in scheduler._next and scheduler._is_due(*due(scheduler, "first")), 20)
        scheduler.set_pause_state(PauseState.PAUSED_ALL)
        harness.step()
        assert "first" in scheduler._orders
        assert not harness.steps[-1].num_scheduled_tokens
        scheduler.set_pause_state(PauseState.UNPAUSED)
        for manager in tails(harness):
            (copy,) = manager.held["first"]
            state = manager.req_to_blocks["first"][6]
            pairs = [(copied.src_block_id, copied.dst_block_id) for copied in harness.steps[-1].kv_cache_block_copies]
            assert (state.block_id, copy.block_id) in pairs
            assert copy.block_hash is not None
        harness.run()
        assert found(harness, "second") == 100

    def test_without_a_block_for_the_copy_nothing_is_shared(self, make, monkeypatch):
        harness = make("states")
        keep_states = harness.scheduler._keep_states

        def without_room():
            take_all(harness, num_left=1)  # there are two groups of states
            keep_states()
            give_back(harness)

        monkeypatch.setattr(harness.scheduler, "_keep_states", without_room)
        assert found(harness, "first") == found(harness, "second") == 0
        monkeypatch.undo()
        assert found(harness, "third") == 0
        assert found(harness, "fourth") == DOCUMENT
        check_nothing_left(harness.scheduler)

    def test_a_copy_that_nobody_publishes_is_freed(self, make):
        """The request is preempted in the step of its compaction."""
        harness = make("states")
        ask(harness, "first", num_tokens=40)
        scheduler: L2KVScheduler = harness.scheduler
        harness.run_until(lambda: "first" in scheduler._next and scheduler._is_due(*due(scheduler, "first")), 20)
        schedule, preempted = scheduler._update_after_schedule, []

        def preempt(output):
            schedule(output)
            if not preempted and scheduler._orders:
                preempted.append(scheduler.running.pop())
                scheduler._preempt_request(preempted[0], 0.0)

        scheduler._update_after_schedule = preempt
        harness.step()
        assert [request.request_id for request in preempted] == ["first"]
        assert not any(manager.kept or manager.held for manager in tails(harness))

    def test_a_hit_is_not_cut_inside_a_block_that_is_being_computed(self, make):
        """The first request of this prompt has left a state at 48 tokens, inside a block of the full layer.

        The second fills that block, so it is findable as a whole in this very step. A copy would be made before.
        """
        harness = make("states, and a full layer in larger blocks")
        harness.submit("first", [1] * 49, None, 3)
        harness.run()
        for req_id in ("second", "third"):
            harness.submit(req_id, [1] * 48 + [2] * 40, None, 3)
        output = harness.step()
        assert {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs} == {"second": 48, "third": 48}
        copies = output.kv_cache_block_copies
        assert not {copied.src_block_id for copied in copies} & {copied.dst_block_id for copied in copies}
        written = {block for new in output.scheduled_new_reqs for table in new.block_ids for block in table[3:]}
        assert not written & {copied.src_block_id for copied in copies}
        harness.run()


def due(scheduler: L2KVScheduler, req_id: str):
    return scheduler.requests[req_id], scheduler._next[req_id]
