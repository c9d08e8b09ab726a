"""The scheduler's statistics of compactions, compared with the pool and the orders."""

from itertools import chain

import pytest
from vllm import envs

from vllm_l2kv.messages.orders import orders_of, seconds_of, with_seconds
from vllm_l2kv.messages.stats import take_stats


@pytest.fixture
def reporting(make_harness, monkeypatch):
    """A harness whose scheduler reports statistics; all are in its list `reported`."""

    set_plugins(monkeypatch, ["l2kv"])  # as the server does

    def make(num_blocks: int, **arguments):
        harness = make_harness(num_blocks, log_stats=True, **arguments)
        harness.reported = []
        update = harness.scheduler.update_from_output

        def listen(*args):
            outputs = update(*args)
            harness.reported += [
                take_stats(client.scheduler_stats) for client in outputs.values() if client.scheduler_stats
            ]
            return outputs

        harness.scheduler.update_from_output = listen
        return harness

    return make


def set_plugins(monkeypatch, plugins: list[str] | None) -> None:
    """Not by the environment, which vLLM may have cached for engines of other tests."""
    monkeypatch.setitem(vars(envs), "VLLM_PLUGINS", plugins)


def total(harness, name: str):
    values = [getattr(stats, name) for stats in harness.reported]
    return list(chain(*values)) if isinstance(values[0], list) else sum(values)


def test_numbers_are_those_of_the_orders(reporting):
    harness = reporting(400)
    harness.add("half", 100, ratio=0.5)
    harness.add("tenth", 200, ratio=0.1)
    harness.add("whole", 300)
    harness.run()
    orders = [order for step in harness.steps for order in orders_of(step)]
    assert sorted(total(harness, "compactions")) == [("ratio", 20, 180), ("ratio", 50, 50)]
    assert total(harness, "num_compressed") == len(orders) == 2
    moves = [move for order in orders for move in order.moves]
    assert total(harness, "num_taken_blocks") == sum(len(move.destination) for move in moves)
    assert total(harness, "num_freed_blocks") == sum(len(move.source) for move in moves)
    assert total(harness, "num_preempted") == 0


def test_compactions_by_kind(reporting):
    """Each compaction has its kept and evicted rows; a request counts once."""
    harness = reporting(400, prompt_interval=60, answer_interval=30)
    harness.submit("prompt", [1] * 200, {"kv_max_tokens": 40}, 8)  # at 100 and 160, and at its end with 80 rows
    harness.submit("answer", [2] * 30, {"kv_max_tokens": 40}, 60)  # at 70
    harness.submit("both", [3] * 90, {"kv_max_tokens": 40, "kv_keep_ratio": 0.25}, 60)  # at 90, and with 70 rows at 137
    harness.run()
    by_ratio, in_prompts = [("ratio", 23, 67)], [("prompt_budget", 40, 60)] * 2
    in_answers = [("answer_budget", 40, 30)] * 2 + [("answer_budget", 40, 40)]
    assert sorted(total(harness, "compactions")) == in_answers + in_prompts + by_ratio
    assert total(harness, "num_compressed") == 3


def test_tokens_now(reporting):
    harness = reporting(400)
    harness.add("half", 100, max_tokens=8, ratio=0.5)
    harness.add("whole", 60, max_tokens=30)
    harness.run()
    # Seven of eight tokens are computed; both requests run when the first is compacted.
    compacted = [stats for stats in harness.reported if stats.logical_tokens - stats.physical_tokens == 50]
    assert len(compacted) >= 5
    for stats in compacted:
        held = stats.logical_tokens + 4 * stats.physical_tokens  # one of five layers is full
        assert stats.memory_ratio == held / (5 * stats.logical_tokens)
    assert max(stats.logical_tokens for stats in harness.reported) > 160
    assert harness.reported[-1].logical_tokens == harness.reported[-1].physical_tokens == 0
    assert harness.reported[-1].memory_ratio == 1


def test_blocks_that_others_hold_are_not_freed(reporting):
    harness = reporting(400)
    for req_id, ratio in (("first", 1.0), ("second", 0.5)):
        harness.submit(req_id, list(range(160)), {"kv_keep_ratio": ratio}, 20)
    harness.run()
    (order,) = [order for step in harness.steps for order in orders_of(step)]
    assert total(harness, "num_freed_blocks") < len(order.moves[0].source)


def test_a_request_that_is_preempted_counts_once(reporting):
    harness = reporting(36, full_layers=(0,))
    for i in range(4):
        harness.submit(f"{i}", list(range(1000 * i, 1000 * i + 120)), {"kv_keep_ratio": 0.5}, 120)
    harness.run()
    preempted = sum(len(step.preempted_req_ids or ()) for step in harness.steps)
    orders = [order for step in harness.steps for order in orders_of(step)]
    assert preempted
    assert total(harness, "num_compressed") == 4
    assert len(total(harness, "compactions")) == len(orders) > 4  # the work is repeated


def test_a_preemption_for_a_compaction_counts(reporting):
    """Two requests share blocks that neither may write, and no block is free for a copy."""
    harness = reporting(40, full_layers=(), max_num_batched_tokens=256)
    shared = [1] * 160
    harness.submit("first", shared, {}, 30)
    for _ in range(3):
        harness.step()
    harness.submit("r", [*shared, 2], {"kv_keep_ratio": 0.9}, 24)
    harness.step()
    held = harness.pool.get_new_blocks(harness.pool.get_num_free_blocks() - 4)
    harness.compressed.req_to_blocks["another holder"] = held
    harness.run_until(harness.preempted)
    harness.pool.free_blocks(harness.compressed.req_to_blocks.pop("another holder"))
    harness.run()
    assert total(harness, "num_preempted") == len(harness.preempted()) == 1
    assert total(harness, "compactions") == [("ratio", 145, 16)]


def test_times_are_attached_to_a_copy():
    class Output:
        pass

    shared = Output()
    assert seconds_of(with_seconds(shared, [0.5])) == [0.5]
    assert seconds_of(shared) == []


def test_a_stock_front_end_gets_no_statistics(make_harness, monkeypatch):
    set_plugins(monkeypatch, None)
    with pytest.raises(ValueError, match="VLLM_PLUGINS=l2kv"):
        make_harness(100, log_stats=True)
