"""The host prepares a step while the device runs the one before, which must still read its own counts."""

import pytest
import torch
from fake_gpu import HostRunner, order

from vllm_l2kv.kernels.slots import physical_lengths
from vllm_l2kv.worker.runner import Step
from vllm_l2kv.worker.runner_v2 import RunnerV2

pytestmark = pytest.mark.gpu

BEGUN = {"finished": 11, "preempted": 22, "undisturbed": 33}
NEXT = order("undisturbed", 44)
LENGTHS = 1000


def as_the_worker_does(runner: RunnerV2) -> None:
    runner.begin_step(Step(["finished", "preempted"], [NEXT]))
    runner._tables.apply_staged_writes()


def as_it_once_did(runner: RunnerV2) -> None:
    """Publishes after every change, so the second publication overwrites what the step in flight reads."""
    runner.counts.forget(["finished"])
    runner.counts.publish()
    runner.counts.forget(["preempted"])
    runner.counts.publish()
    runner.counts.set(NEXT.req_id, 2, NEXT.num_evicted)
    runner.counts.publish()


@pytest.mark.parametrize(("prepare", "is_disturbed"), [(as_the_worker_does, False), (as_it_once_did, True)])
def test_a_step_that_waits_for_the_device_finds_its_own_counts(prepare, is_disturbed):
    device = torch.device("cuda")
    vllm_runner = HostRunner(max_num_reqs=4, device=device)
    vllm_runner.req_states.req_id_to_index.update({req_id: i for i, req_id in enumerate(BEGUN)})
    runner = RunnerV2(vllm_runner, [0])
    lengths = torch.full((3,), LENGTHS, dtype=torch.int32, device=device)
    states = torch.arange(3, device=device)
    found = torch.zeros_like(lengths)
    physical_lengths(found, lengths, states, runner.counts.on_device)  # compiles
    torch.cuda.synchronize()

    runner.begin_step(Step(orders=[order(req_id, num_evicted) for req_id, num_evicted in BEGUN.items()]))
    vllm_runner.block_tables.apply_staged_writes()
    torch.cuda._sleep(500_000_000)  # clock cycles: about a quarter of a second
    waiting = torch.cuda.Event()
    waiting.record()
    physical_lengths(found, lengths, states, runner.counts.on_device)
    prepare(runner)
    assert not waiting.query(), "the device was not busy long enough to show anything"
    torch.cuda.synchronize()

    expected = torch.tensor([LENGTHS - num_evicted for num_evicted in BEGUN.values()], dtype=torch.int32)
    assert torch.equal(found.cpu(), expected) != is_disturbed

    physical_lengths(found, lengths, states, runner.counts.on_device)
    assert found.tolist() == [LENGTHS, LENGTHS, LENGTHS - NEXT.num_evicted]
