"""Decisions of the scheduler, with one step in flight (as on CPUs) and with two (async scheduling)."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from usages import usage
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.messages.orders import orders_of
from vllm_l2kv.messages.usage import KeptWhole
from vllm_l2kv.scheduler.integrity import check_nothing_left, num_evicted


@pytest.fixture(params=[1, 2], ids=["sync", "async"])
def depth(request) -> int:
    return request.param


def orders(harness) -> list:
    return [order for output in harness.steps for order in orders_of(output)]


def check_whole(harness, num_blocks: int) -> None:
    assert harness.pool.get_num_free_blocks() == num_blocks
    check_nothing_left(harness.scheduler)


def test_groups_of_the_harness(make_harness):
    harness = make_harness(20)
    sizes = [
        (type(m).__name__, m.block_size) for m in harness.scheduler.kv_cache_manager.coordinator.single_type_managers
    ]
    assert sizes == [("FullLayerManager", 64), ("CompressedLayerManager", 16)]


def test_one_order_right_after_the_last_chunk(make_harness, depth):
    harness = make_harness(100, depth=depth)
    harness.add("r", 150, ratio=0.5)  # chunks of 64, 64 and 22
    harness.run()
    assert [len(orders_of(output)) for output in harness.steps[:5]] == [0, 0, 0, 1, 0]
    (order,) = orders(harness)
    assert (order.num_rows, order.num_keep, order.num_evicted) == (150, 75, 75)
    (move,) = order.moves
    assert len(move.source) == 10
    assert len(move.destination) == 5
    assert not set(move.source) & set(move.destination)
    assert harness.outputs["r"] == [7] * 8
    assert harness.usage["r"] == {
        "prompt_tokens": 150,
        "kept_tokens": 82,
        "evicted_tokens": 75,
        "compactions": 1,
        "memory_ratio": 0.6178,  # (157 + 4 * 82) / (5 * 157)
    }
    check_whole(harness, 100)


def test_a_request_without_fields_is_not_changed(make_harness, depth):
    harness = make_harness(100, depth=depth)
    harness.add("r", 150)
    harness.run()
    assert not orders(harness)
    assert not harness.usage
    check_whole(harness, 100)


def test_the_operators_default_compresses_and_is_reported(make_harness):
    harness = make_harness(100)
    harness.scheduler.settings = type(harness.scheduler.settings)(
        (0,), defaults=harness.scheduler.settings.defaults.override({"kv_keep_ratio": 0.5})
    )
    harness.add("default", 100)
    harness.add("its own", 100, ratio=1.0)
    harness.run()
    assert [order.req_id for order in orders(harness)] == ["default"]
    assert harness.usage["its own"]["evicted_tokens"] == 0
    assert harness.usage["default"]["evicted_tokens"] == 50


def test_no_compaction_when_no_step_follows(make_harness, depth):
    harness = make_harness(100, depth=depth)
    harness.add("r", 50, max_tokens=1, ratio=0.1)
    harness.run()
    assert not orders(harness)
    assert harness.usage["r"] == usage(50, 1, reason=KeptWhole.FIRST_TOKEN)
    check_whole(harness, 100)


def test_a_prompt_kept_whole_says_why(make_harness, depth):
    harness = make_harness(100, depth=depth)
    harness.add("protected", 50, ratio=0.1, kv_protect_first=10, kv_protect_last=40)
    harness.add("short", 5, ratio=0.9)
    harness.add("asked for it", 50, ratio=1.0)
    harness.add("evicted", 51, ratio=0.1, kv_protect_first=10, kv_protect_last=40)
    harness.run()
    assert harness.usage == {
        "protected": usage(50, 8, reason=KeptWhole.PROTECTED),
        "short": usage(5, 8, reason=KeptWhole.ROUNDED),
        "asked for it": usage(50, 8),
        "evicted": usage(51, 8, evicted=1),
    }


def test_freed_blocks_of_one_order_are_no_destination_of_another_in_the_same_step(make_harness, depth):
    harness = make_harness(60, depth=depth, max_num_batched_tokens=256)
    for i in range(3):
        harness.add(f"r{i}", 60, ratio=0.3)
    harness.run()
    together = next(orders_of(output) for output in harness.steps if orders_of(output))
    assert len(together) == 3
    sources = {block for order in together for move in order.moves for block in move.source}
    destinations = [block for order in together for move in order.moves for block in move.destination]
    assert not sources & set(destinations)
    assert len(set(destinations)) == len(destinations)
    check_whole(harness, 60)


def test_an_order_is_withdrawn_when_its_request_is_preempted_by_the_same_step(make_harness, depth):
    """Its blocks may belong to another request when the worker would move rows into them."""
    # An old request takes the last block in the same step in which a newer one is compacted.
    withdrawn = False
    for length in range(40, 64):
        harness = make_harness(12, depth=depth, max_num_batched_tokens=256)
        harness.add("old", length, max_tokens=30)
        harness.step()
        harness.add("new", 64, max_tokens=30, ratio=0.9)
        for _ in range(6):
            compacted_before = set(harness.compressed.num_evicted)
            output = harness.step()
            reported = {order.req_id for order in orders_of(output)}
            assert reported == set(harness.compressed.num_evicted) - compacted_before
            if output.preempted_req_ids and "new" in harness.scheduler.requests:
                assert "new" not in reported
                withdrawn = True
        harness.run()
        check_whole(harness, 12)
    assert withdrawn


def crowd(harness, ratio=0.9, **about) -> None:
    """Two requests share the blocks of one prompt, which neither may write, and no block is free for a copy."""
    shared = [1] * 160
    harness.submit("first", shared, {}, 30, **about)
    for _ in range(3):
        harness.step()
    harness.submit("r", [*shared, 2], {"kv_keep_ratio": ratio}, 24)
    harness.step()
    num_held = harness.pool.get_num_free_blocks() - (4 if ratio > 0.5 else 1)
    harness.compressed.req_to_blocks["another holder"] = harness.pool.get_new_blocks(num_held)


def test_without_room_for_a_compaction_the_newest_request_is_preempted(make_harness, depth):
    """Here this is the request itself. It restarts when there is room, and is compacted at the same position."""
    harness = make_harness(40, full_layers=(), depth=depth, max_num_batched_tokens=256)
    crowd(harness)
    for _ in range(5):
        harness.step()
    assert harness.preempted() == ["r"]
    assert not orders(harness)
    assert harness.usage["r"] == usage(161, 1, reason=KeptWhole.FIRST_TOKEN)
    harness.pool.free_blocks(harness.compressed.req_to_blocks.pop("another holder"))
    harness.run()
    (order,) = orders(harness)
    assert (order.num_rows, order.num_keep, order.num_evicted) == (161, 145, 16)
    assert harness.usage["r"] == usage(161, 24, evicted=16, full_share=Fraction(0))
    assert len(harness.outputs["r"]) == 24
    assert len(harness.outputs["first"]) == 30
    check_whole(harness, 40)


def test_a_request_on_shared_blocks_begins_when_there_is_room_for_its_compaction(make_harness, depth):
    """Otherwise it would compute its prompt and be preempted at once."""
    harness = make_harness(40, full_layers=(), depth=depth, max_num_batched_tokens=256)
    shared = [1] * 160
    harness.submit("first", shared, {}, 30)
    for _ in range(3):
        harness.step()
    harness.compressed.req_to_blocks["another holder"] = harness.pool.get_new_blocks(
        harness.pool.get_num_free_blocks() - 4
    )
    harness.submit("r", [*shared, 2], {"kv_keep_ratio": 0.9}, 24)
    harness.run_until(lambda: "first" not in harness.scheduler.requests)
    assert not harness.outputs.get("r")
    harness.run()
    assert not harness.preempted()
    assert len(harness.outputs["r"]) == 24
    harness.pool.free_blocks(harness.compressed.req_to_blocks.pop("another holder"))
    check_whole(harness, 40)


def test_a_request_of_lower_priority_is_preempted_for_a_compaction(make_harness, depth):
    harness = make_harness(40, full_layers=(), depth=depth, max_num_batched_tokens=256, scheduling_policy="priority")
    crowd(harness, priority=1)
    harness.run_until(harness.preempted)
    assert harness.preempted() == ["first"]
    assert [order.req_id for order in orders(harness)] == ["r"]
    harness.pool.free_blocks(harness.compressed.req_to_blocks.pop("another holder"))
    harness.run()
    assert len(harness.outputs["first"]) == 30
    check_whole(harness, 40)


def test_a_request_preempted_for_a_compaction_repeats_no_token(make_harness, depth):
    """Its last token may still be in flight, and an immediate restart would compute it twice."""
    harness = make_harness(40, full_layers=(), depth=depth, max_num_batched_tokens=512, scheduling_policy="priority")
    harness.execute = lambda output: [
        [harness.computed_after(output, req_id)] for req_id in output.num_scheduled_tokens
    ]
    crowd(harness, ratio=0.1, priority=1)
    harness.run_until(harness.preempted)
    harness.pool.free_blocks(harness.compressed.req_to_blocks.pop("another holder"))
    harness.run()
    assert harness.preempted() == ["first"]
    assert harness.outputs["first"] == list(range(160, 190))
    assert harness.outputs["r"] == list(range(161, 185))


def test_no_chunk_runs_past_a_compaction(make_harness, depth):
    """A preempted request restarts with its prompt and its answer, but is compacted between the two."""
    from vllm.v1.request import RequestStatus

    harness = make_harness(40, depth=depth, max_num_batched_tokens=64)
    request = harness.add("r", 100, max_tokens=30, ratio=0.5)
    harness.run_until(lambda: request.num_output_tokens >= 12)
    assert harness.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert request.status == RequestStatus.PREEMPTED
    num_output, begun = request.num_output_tokens, len(harness.steps)
    harness.run()
    again = [output for output in harness.steps[begun:] if output.num_scheduled_tokens.get("r")]
    assert [output.num_scheduled_tokens["r"] for output in again[:4]] == [64, 36, num_output, 1]
    assert [len(orders_of(output)) for output in again[:4]] == [0, 0, 1, 0]
    check_whole(harness, 40)


def test_in_place_when_nothing_is_free(make_harness, depth):
    harness = make_harness(13, full_layers=(), depth=depth, max_num_batched_tokens=256)
    harness.add("r", 200, max_tokens=6, ratio=0.5)  # 13 blocks
    harness.run()
    (order,) = orders(harness)
    (move,) = order.moves
    assert move.destination == move.source[: len(move.destination)]
    check_whole(harness, 13)


def test_preempted_requests_are_compacted_again(make_harness, depth):
    harness = make_harness(24, depth=depth, max_num_batched_tokens=256)
    for i in range(6):
        harness.add(f"r{i}", 60, max_tokens=40, ratio=0.5)
    harness.run()
    preempted = {req_id for output in harness.steps for req_id in output.preempted_req_ids or ()}
    compacted = [order.req_id for order in orders(harness)]
    assert preempted
    assert any(compacted.count(req_id) > 1 for req_id in preempted)
    assert {(order.num_rows, order.num_keep) for order in orders(harness)} == {(60, 30)}
    assert all(len(tokens) == 40 for tokens in harness.outputs.values())
    assert len(harness.outputs) == 6
    check_whole(harness, 24)


def test_abort_between_any_two_steps(make_harness, depth):
    from vllm.v1.request import RequestStatus

    for num_steps in range(6):
        harness = make_harness(40, depth=depth)
        harness.add("gone", 150, ratio=0.3)
        harness.add("stays", 30, ratio=0.3)
        for _ in range(num_steps):
            harness.step()
        harness.scheduler.finish_requests("gone", RequestStatus.FINISHED_ABORTED)
        harness.run()
        assert harness.outputs["stays"] == [7] * 8
        check_whole(harness, 40)


def test_nothing_after_a_compaction_enters_the_prefix_cache(make_harness, depth):
    harness = make_harness(60, depth=depth, max_num_batched_tokens=256)
    harness.add("r", 60, max_tokens=100, ratio=0.5)
    published = set()
    while harness.scheduler.has_unfinished_requests():
        harness.step()
        for manager in harness.scheduler.kv_cache_manager.coordinator.single_type_managers:
            blocks = manager.req_to_blocks.get("r", [])
            published |= {(manager.kv_cache_group_id, i) for i, block in enumerate(blocks) if block.block_hash}
        if "r" in harness.compressed.num_evicted:
            assert not [block for block in harness.compressed.req_to_blocks["r"] if block.block_hash]
    # 60 tokens do not fill a block of 64 in the full group; later tokens would, if they were published.
    assert not {entry for entry in published if entry[0] == 0 and entry[1] > 0}


def test_a_bad_value_fails_its_request_alone(make_harness, depth):
    harness = make_harness(40, depth=depth)
    harness.add("bad", 40, ratio=7)
    harness.add("good", 40, ratio=0.5)
    harness.run()
    assert harness.outputs["good"] == [7] * 8
    assert harness.finish_reasons == {"good": "length", "bad": "error"}
    assert len(harness.outputs["bad"]) <= depth  # vLLM fails it at the end of its first step
    check_whole(harness, 40)


@pytest.mark.parametrize("ratio", [0.1, 7], ids=["compressed", "refused"])
def test_a_request_inherits_nothing_from_an_aborted_one_of_the_same_id(make_harness, ratio):
    """vLLM allows the same id again before a step has reported that its first request is gone."""
    from vllm.v1.request import RequestStatus

    harness = make_harness(40)
    harness.add("r", 100, ratio=ratio)
    harness.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    harness.add("r", 100)
    harness.run()
    assert not orders(harness)
    assert not harness.usage
    assert harness.outputs["r"] == [7] * 8
    check_whole(harness, 40)


def test_no_block_is_copied_in_the_step_that_fills_it(make_harness, depth):
    """A copy for a hit inside a block is made before the step writes its own rows."""
    harness = make_harness(40, depth=depth, max_num_batched_tokens=256)
    harness.add("first", 60)
    first, second = harness.scheduler.requests["first"], harness.add("second", 60)
    second.prompt_token_ids[:50] = second._all_token_ids[:50] = first.prompt_token_ids[:50]
    second.block_hashes.clear()
    second.update_block_hashes()
    output = harness.step()
    filled = {block for new in output.scheduled_new_reqs for blocks in new.block_ids for block in blocks}
    assert not [copy for copy in output.kv_cache_block_copies or () if copy.src_block_id in filled]
    harness.run()
    check_whole(harness, 40)


def test_a_step_is_planned_before_the_tokens_of_the_last_one_are_known(make_harness):
    """This is async scheduling, which a subclass of vLLM's synchronous scheduler would lose."""
    harness = make_harness(40, depth=2)
    harness.add("r", 20, ratio=0.5)
    assert [harness.schedule().num_scheduled_tokens for _ in range(2)] == [{"r": 20}, {"r": 1}]
    harness.finish_one()
    harness.run()
    check_whole(harness, 40)


@pytest.mark.parametrize("way", ["end", "abort", "reset", "no blocks"])
def test_all_ways_to_lose_the_blocks_use_one_method(make_harness, depth, way, monkeypatch):
    """Managers forget a compaction there, exactly once, and the next step informs the worker."""
    from vllm.v1.request import RequestStatus

    harness = make_harness(24 if way == "no blocks" else 60, full_layers=(), depth=depth, max_num_batched_tokens=256)
    lost = []
    door = type(harness.compressed).pop_blocks_for_free

    def noted(manager, request_id):
        lost.append(request_id)
        return door(manager, request_id)

    monkeypatch.setattr(type(harness.compressed), "pop_blocks_for_free", noted)
    # The newer request is preempted if they cannot both grow.
    harness.add("older", 100, max_tokens=180, ratio=0.9)
    harness.add("r", 100, max_tokens=180 if way == "no blocks" else 8, ratio=0.9)
    while num_evicted(harness.scheduler, "r") == 0:
        harness.step()
    if way == "abort":
        harness.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    if way == "reset":
        assert harness.scheduler.reset_prefix_cache(reset_running_requests=True)
    begin = len(harness.steps)
    while "r" not in lost:
        harness.step()
    harness.step()
    assert lost.count("r") == 1
    reported = [{*step.finished_req_ids, *(step.preempted_req_ids or ())} for step in harness.steps[begin:]]
    assert sum("r" in gone for gone in reported) == 1
    harness.run()
    check_whole(harness, 24 if way == "no blocks" else 60)


def image(first: int, last: int) -> MultiModalFeatureSpec:
    """An image at these positions, between two tokens and one that belong to its placeholder."""
    is_embed = torch.tensor([False] * 2 + [True] * (last + 1 - first) + [False])
    place = PlaceholderRange(offset=first - 2, length=len(is_embed), is_embed=is_embed)
    return MultiModalFeatureSpec(data=None, modality="image", identifier="image", mm_position=place)


def with_image(harness, first: int, last: int, req_id: str, num_prompt_tokens: int, **fields: Any) -> Request:
    return harness.submit(req_id, [5] * num_prompt_tokens, fields, 8, mm_features=[image(first, last)])


@pytest.mark.parametrize("as_a_whole", [False, True])
@pytest.mark.parametrize(
    ("last", "fields", "expected"),
    [
        (47, {"kv_keep_ratio": 0.5, "kv_prefix_tokens": 40}, "tokens 32 to 47 .* set it to 32 or 48"),
        (47, {"kv_max_tokens": 24}, 32),
        (48, {"kv_max_tokens": 32}, "tokens 32 to 48 .* at least 33, or --kv-prompt-interval to at least .* 17 tokens"),
    ],
)
def test_a_compaction_inside_an_image(make_harness, as_a_whole, last, fields, expected):
    """If the image must be computed in one step, one by a budget is earlier; another one fails its request."""
    harness = make_harness(40, prompt_interval=16)
    harness.scheduler._reads_images_as_a_whole = as_a_whole
    request = with_image(harness, 32, last, "r", 60, **fields)
    assert harness.scheduler._whole_images(request) == (((32, last),) if as_a_whole else ())
    if not as_a_whole:
        expected = fields.get("kv_prefix_tokens") or fields["kv_max_tokens"] + 16
    if isinstance(expected, int):
        assert harness.scheduler._states["r"].points.after(None).position == expected
    else:
        with pytest.raises(ParamError, match=expected):
            harness.scheduler._state_of(request, harness.scheduler._read_fields(request))


@pytest.fixture
def make_seeing_harness(make_harness, monkeypatch):
    """Makes harnesses of a model whose images must be computed in one step: 64 tokens a step, 44 of a request."""

    def make(is_rolled_back: bool = True) -> Any:
        harness = make_harness(200, prompt_interval=50, answer_interval=50, long_prefill_token_threshold=44)
        scheduler = harness.scheduler
        monkeypatch.setattr(scheduler.scheduler_config, "disable_chunked_mm_input", is_rolled_back)
        scheduler._reads_images_as_a_whole = True
        scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=1000)
        scheduler.max_num_encoder_input_tokens = 1000
        return harness

    return make


def chunk_ends(harness, req_id: str) -> list[int]:
    """Returns how many tokens of a request are computed after each step that computes some."""
    steps = [output for output in harness.steps if req_id in output.num_scheduled_tokens]
    return [harness.computed_after(output, req_id) for output in steps]


def test_an_image_after_a_compaction_is_computed_in_one_step(make_seeing_harness):
    """It waits for a step with room for it. vLLM would divide it, since the chunk begins at its first token."""
    harness = make_seeing_harness()
    harness.add("older", 300)  # leaves 20 tokens of each step
    with_image(harness, 60, 99, "r", 130, kv_max_tokens=20)
    harness.run()
    assert chunk_ends(harness, "r")[:6] == [20, 40, 58, 60, 104, 110]
    assert [order.num_rows for order in orders(harness)] == [60, 70]
    assert harness.outputs["r"] == [7] * 8
    check_whole(harness, 200)


def test_a_request_that_finds_all_rows_before_an_image_waits_too(make_seeing_harness):
    harness = make_seeing_harness()
    with_image(harness, 60, 99, "first", 105, kv_max_tokens=20)
    harness.run()
    harness.add("older", 300)
    with_image(harness, 60, 99, "second", 105, kv_max_tokens=20)
    harness.run()
    assert harness.usage["second"]["found_tokens"] == 60
    assert chunk_ends(harness, "second")[:2] == [104, 105]
    assert harness.outputs["second"] == [7] * 8
    check_whole(harness, 200)


def test_an_image_longer_than_a_chunk_may_be_does_not_wait(make_seeing_harness):
    """No step could compute it whole as long as there are two requests. vLLM 0.33's own rule would wait for ever."""
    harness = make_seeing_harness(is_rolled_back=False)
    for req_id in ("one", "other"):
        with_image(harness, 60, 104, req_id, 130, kv_max_tokens=20)
    harness.run()
    assert [harness.outputs[req_id] for req_id in ("one", "other")] == [[7] * 8] * 2
    check_whole(harness, 200)
