"""Runner V2 without a GPU. `test_runner_v2_interpreted.py` runs it with the real kernels, in Triton's interpreter."""

import random
from collections import Counter

import pytest
import torch
from fake_gpu import FakeGPUWorker, HostRunner, order, patch_vllm, step_output
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu import buffer_utils

from vllm_l2kv.worker import runner_v2
from vllm_l2kv.worker.runner import Step
from vllm_l2kv.worker.runner_v2 import RunnerV2


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    patch_vllm(monkeypatch)


def busy_steps(seed: int, num_steps: int):
    """Yields steps that finish, preempt and compact repeatedly, with states reused by new requests at once."""
    rng = random.Random(seed)
    states: dict[str, int] = {}
    compacted: dict[str, int] = {}
    for i in range(num_steps):
        gone = rng.sample(sorted(states), rng.randint(0, len(states)))
        split = rng.randint(0, len(gone))
        for req_id in gone:
            del states[req_id]
            compacted.pop(req_id, None)
        chosen = [req_id for req_id in states if rng.random() < 0.5]
        compacted.update({req_id: compacted.get(req_id, 0) + rng.randint(1, 1000) for req_id in chosen})
        free = [state for state in range(8) if state not in states.values()]
        new = {f"{i}-{state}": state for state in rng.sample(free, rng.randint(0, len(free)))}
        hits = {req_id: rng.randint(1, 1000) for req_id in new if rng.random() < 0.3}
        orders = [order(req_id, compacted[req_id]) for req_id in chosen]
        expected = torch.zeros(8, dtype=torch.int32)
        for req_id, num_evicted in compacted.items():
            expected[states[req_id]] = num_evicted
        states.update(new)
        compacted.update(hits)
        for req_id, num_evicted in hits.items():
            expected[states[req_id]] = num_evicted
        yield step_output(gone[:split], gone[split:], orders, new, hits), expected


@pytest.mark.parametrize("num_in_flight", [2, 3, 5])
def test_a_step_under_way_keeps_its_counts(num_in_flight, monkeypatch):
    """VLLM gives every buffer a copy for each step in flight, and the host is up to that many steps ahead."""
    monkeypatch.setattr(buffer_utils, "_DEFAULT_MAX_CONCURRENCY", num_in_flight)
    worker = FakeGPUWorker(HostRunner(), num_in_flight=num_in_flight)
    for output, expected in busy_steps(0, 300):
        worker.execute_model(output)
        assert torch.equal(worker.in_flight[-1][0], expected)
        worker.check_in_flight()


def test_counts_are_published_at_most_once_a_step(monkeypatch):
    published = Counter()
    copy_to_uva = buffer_utils.UvaBackedTensor.copy_to_uva

    def counted(tensor, *args):
        published[id(tensor)] += 1
        return copy_to_uva(tensor, *args)

    worker = FakeGPUWorker(HostRunner())
    monkeypatch.setattr(buffer_utils.UvaBackedTensor, "copy_to_uva", counted)
    for output, _ in busy_steps(1, 100):
        published.clear()
        worker.execute_model(output)
        assert max(published.values(), default=0) <= 1
    published.clear()
    worker.execute_model(step_output())
    assert not published[id(worker._runner.counts._counts)], "nothing changed"


# --- lengths and slots

LENGTHS = [20, 30, 40]
STATES = [5, 2, 7]


def begin_step(vllm_runner: HostRunner, runner: RunnerV2, gone, orders, hits=()) -> None:
    """Runs the beginning of a step: the runner's part around vLLM's, which adds states of new requests."""
    runner.begin_step(Step(gone, orders, dict(hits)))
    vllm_runner.block_tables.apply_staged_writes()


def compacted_runner() -> tuple[HostRunner, RunnerV2]:
    """A runner with requests in states 5, 2 and 7; that in state 2 has evicted 16 tokens of group 0, in blocks of 4."""
    vllm_runner = HostRunner()
    vllm_runner.req_states.req_id_to_index.update(a=5, b=2, c=7)
    for state in STATES:
        vllm_runner.block_tables.append_block_ids(state, ([*range(10, 26)], [*range(30, 38)]), overwrite=True)
    runner = RunnerV2(vllm_runner, [0])
    begin_step(vllm_runner, runner, [], [order("b", 16, destination=(3, 9, 4, 8))])
    return vllm_runner, runner


def real_metadata(vllm_runner: HostRunner) -> list[CommonAttentionMetadata]:
    """Returns attention's metadata of each group, in a step that computes one token of each request."""
    idx_mapping, starts = torch.tensor(STATES), torch.arange(4, dtype=torch.int32)
    vllm_runner.block_tables.compute_slot_mappings(idx_mapping, starts, torch.tensor(LENGTHS) - 1, 3)
    return vllm_runner.build(torch.tensor(LENGTHS, dtype=torch.int32), states=STATES)


def real_lengths(vllm_runner: HostRunner) -> list[torch.Tensor]:
    """Returns the lengths in it."""
    return [metadata.seq_lens for metadata in real_metadata(vllm_runner)]


def test_only_compressed_groups_have_physical_lengths():
    vllm_runner, _ = compacted_runner()
    compressed, full = real_lengths(vllm_runner)
    assert compressed.tolist() == [20, 14, 40]
    assert full.tolist() == LENGTHS


def test_lengths_on_the_host_are_physical():
    """FlashInfer plans by them, FlashAttention by the longest one."""
    vllm_runner, runner = compacted_runner()
    begin_step(vllm_runner, runner, [], [order("c", 30, destination=(3,))])
    compressed, full = real_metadata(vllm_runner)
    assert compressed.seq_lens_cpu_upper_bound.tolist() == compressed.seq_lens.tolist() == [20, 14, 10]
    assert full.seq_lens_cpu_upper_bound.tolist() == LENGTHS
    assert (compressed.max_seq_len, full.max_seq_len) == (20, 40)
    begin_step(vllm_runner, runner, [], [order("c", 35, destination=(3,)), order("a", 10, destination=(5,))])
    assert real_metadata(vllm_runner)[0].max_seq_len == 14
    begin_step(vllm_runner, runner, ["a", "b", "c"], [])
    assert real_metadata(vllm_runner)[0].max_seq_len == 40


def test_lengths_on_the_host_are_physical_beside_recurrent_layers():
    """vLLM does not tell the states of a batch then. It sorts requests by their numbers of tokens."""
    vllm_runner, runner = compacted_runner()
    for num_scheduled, right in (({"a": 1, "b": 1, "c": 1}, [20, 14, 40]), ({"c": 3, "b": 2, "a": 1}, [20, 14, 40])):
        runner.begin_step(Step(num_scheduled=num_scheduled))
        idx_mapping, starts = torch.tensor(STATES), torch.arange(4, dtype=torch.int32)
        vllm_runner.block_tables.compute_slot_mappings(idx_mapping, starts, torch.tensor(LENGTHS) - 1, 3)
        compressed, full = vllm_runner.build(torch.tensor(LENGTHS, dtype=torch.int32), states=None)
        assert compressed.seq_lens_cpu_upper_bound.tolist() == compressed.seq_lens.tolist() == right
        assert full.seq_lens_cpu_upper_bound.tolist() == LENGTHS


def test_all_builders_of_a_group_share_one_launch_of_lengths(monkeypatch):
    """There is a builder for each number of heads that a layer has in the group."""
    vllm_runner, runner = compacted_runner()
    launches = []
    physical_lengths = runner_v2.physical_lengths
    monkeypatch.setattr(runner_v2, "physical_lengths", lambda *args: launches.append(physical_lengths(*args)))
    for num_evicted in (18, 20):
        begin_step(vllm_runner, runner, [], [order("b", num_evicted, destination=(3,))])
        launches.clear()
        compressed, logical = real_metadata(vllm_runner)
        (group,) = vllm_runner.attn_groups[0]
        again = group.build_metadata(logical)
        assert again.seq_lens.tolist() == compressed.seq_lens.tolist() == [20, 30 - num_evicted, 40]
        assert len(launches) == 1


def test_the_address_of_lengths_does_not_change():
    """A CUDA graph records their addresses when it is captured."""
    vllm_runner, runner = compacted_runner()
    places = set()
    for num_reqs in (8, 1, 3):
        for capture in (True, False):
            places.add(vllm_runner.dummy_metadata(num_reqs, 64, capture)[0].seq_lens.data_ptr())
    places.add(real_lengths(vllm_runner)[0].data_ptr())
    begin_step(vllm_runner, runner, ["b"], [])
    places.add(real_lengths(vllm_runner)[0].data_ptr())
    assert len(places) == 1


def test_a_dummy_batch_has_no_states():
    """Its lengths are those that vLLM gives, whatever the batch before it, and the next batch is a real one again."""
    vllm_runner, _ = compacted_runner()
    real_lengths(vllm_runner)
    for capture in (True, False):
        dummy = vllm_runner.dummy_metadata(4, 64, capture)
        assert [metadata.seq_lens.tolist() for metadata in dummy] == [[64] * 4] * 2
    assert real_lengths(vllm_runner)[0].tolist() == [20, 14, 40]


def test_only_slots_of_compressed_groups_differ_from_positions():
    vllm_runner, _ = compacted_runner()
    idx_mapping, starts = torch.tensor([2, -1, 5]), torch.tensor([0, 3, 4, 5], dtype=torch.int32)
    positions = torch.tensor([28, 29, 30, 0, 19])
    slots = vllm_runner.block_tables.compute_slot_mappings(idx_mapping, starts, positions, 7)
    compressed, full = slots.tolist()
    assert compressed == [8 * 4, 8 * 4 + 1, 8 * 4 + 2, -1, 14 * 4 + 3, -1, -1]
    assert full == [33 * 8 + 4, 33 * 8 + 5, 33 * 8 + 6, -1, 32 * 8 + 3, -1, -1]
    assert slots.data_ptr() == vllm_runner.block_tables.slot_mappings.data_ptr()


def test_slots_are_written_into_the_callers_buffer():
    vllm_runner, _ = compacted_runner()
    mine = torch.full((2, 10), -7)
    arguments = torch.tensor([2]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([28])
    found = vllm_runner.block_tables.compute_slot_mappings(*arguments, 1, out=mine)
    assert found.data_ptr() == mine.data_ptr()
    assert found.tolist() == [[8 * 4], [33 * 8 + 4]]
    assert mine[:, 1:].eq(-1).all()


def test_without_compactions_vllms_own_slots_are_used(monkeypatch):
    vllm_runner, runner = compacted_runner()
    begin_step(vllm_runner, runner, ["b"], [])
    monkeypatch.setattr(runner_v2, "slot_mappings", None)
    monkeypatch.setattr(runner_v2, "physical_lengths", None)
    assert [lengths.tolist() for lengths in real_lengths(vllm_runner)] == [LENGTHS] * 2


def test_a_compaction_rewrites_the_row_of_its_request_and_group():
    vllm_runner, _ = compacted_runner()
    compressed, full = (table.gpu for table in vllm_runner.block_tables.block_tables)
    assert compressed[2, :5].tolist() == [3, 9, 4, 8, 14]
    assert vllm_runner.block_tables.num_blocks.np[:, STATES].tolist() == [[16, 4, 16], [8, 8, 8]]
    for state in (5, 7):
        assert compressed[state].tolist() == [*range(10, 26)]
    assert full[STATES].tolist() == [[*range(30, 38)]] * 3


def test_each_compaction_rewrites_the_present_row():
    """Blocks that it got since the first compaction are removed, and the counts include both."""
    vllm_runner, runner = compacted_runner()
    vllm_runner.block_tables.append_block_ids(2, ([20, 21, 22], []), overwrite=False)
    vllm_runner.block_tables.apply_staged_writes()
    assert vllm_runner.block_tables.block_tables[0].gpu[2, :7].tolist() == [3, 9, 4, 8, 20, 21, 22]
    begin_step(vllm_runner, runner, [], [order("b", 22, destination=(3, 6))])
    compressed, full = (table.gpu for table in vllm_runner.block_tables.block_tables)
    assert compressed[2, :2].tolist() == [3, 6]
    assert full[2].tolist() == [*range(30, 38)]
    assert vllm_runner.block_tables.num_blocks.np[:, STATES].tolist() == [[16, 2, 16], [8, 8, 8]]
    assert real_lengths(vllm_runner)[0].tolist() == [20, 8, 40]


def test_a_request_that_begins_on_compacted_rows_has_their_count():
    """Its state is known only after vLLM has added it; one that was preempted in the same step keeps nothing."""
    vllm_runner, runner = compacted_runner()
    runner.begin_step(Step(["b"], [order("c", 30, destination=(3,))], {"new": 9, "b": 12}))
    del vllm_runner.req_states.req_id_to_index["b"]
    vllm_runner.req_states.req_id_to_index.update(new=2, b=6)
    vllm_runner.block_tables.apply_staged_writes()
    assert runner.counts.by_request() == {"c": 30, "new": 9, "b": 12}
    assert real_lengths(vllm_runner)[0].tolist() == [20, 30 - 9, 40 - 30]


def test_warming_up_leaves_everything_as_it_was():
    vllm_runner, runner = compacted_runner()
    before = [table.gpu.clone() for table in vllm_runner.block_tables.block_tables]
    runner.warm_up()
    assert all(map(torch.equal, before, (table.gpu for table in vllm_runner.block_tables.block_tables)))
    assert real_lengths(vllm_runner)[0].tolist() == [20, 14, 40]


def test_everything_else_is_vllms():
    vllm_runner, _ = compacted_runner()
    assert vllm_runner.block_tables.num_kv_cache_groups == 2
    with pytest.raises(AttributeError):
        _ = vllm_runner.block_tables.no_such_thing
