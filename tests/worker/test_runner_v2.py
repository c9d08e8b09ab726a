"""Runner V2 without a GPU."""

import random
from collections import Counter

import pytest
import torch
from fake_gpu import FakeGPUWorker, make_runner, order, patch_vllm, step_output
from vllm.v1.worker.gpu import buffer_utils


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    patch_vllm(monkeypatch)


def busy_steps(seed: int, num_steps: int):
    """Steps that finish, preempt and compact, with states taken by new requests at once."""
    rng = random.Random(seed)
    states: dict[str, int] = {}
    compacted: dict[str, int] = {}
    for i in range(num_steps):
        gone = rng.sample(sorted(states), rng.randint(0, len(states)))
        split = rng.randint(0, len(gone))
        for req_id in gone:
            del states[req_id]
            compacted.pop(req_id, None)
        chosen = [req_id for req_id in states if req_id not in compacted and rng.random() < 0.5]
        compacted.update({req_id: rng.randint(1, 1000) for req_id in chosen})
        free = [state for state in range(8) if state not in states.values()]
        new = {f"{i}-{state}": state for state in rng.sample(free, rng.randint(0, len(free)))}
        orders = [order(req_id, compacted[req_id]) for req_id in chosen]
        expected = torch.zeros(8, dtype=torch.int32)
        for req_id, num_evicted in compacted.items():
            expected[states[req_id]] = num_evicted
        states.update(new)
        yield step_output(gone[:split], gone[split:], orders, new), expected


@pytest.mark.parametrize("num_in_flight", [2, 3, 5])
def test_a_step_under_way_keeps_its_counts(num_in_flight, monkeypatch):
    """VLLM gives every buffer as many places as steps are in flight, and the host is up to so many steps ahead."""
    monkeypatch.setattr(buffer_utils, "_DEFAULT_MAX_CONCURRENCY", num_in_flight)
    worker = FakeGPUWorker(make_runner(), num_in_flight)
    for output, expected in busy_steps(0, 300):
        worker.execute_model(output)
        assert torch.equal(worker.in_flight[-1][0], expected)
        for found, at_launch in worker.in_flight:
            assert torch.equal(found, at_launch), "a later step changed what a step under way has still to read"


def test_counts_are_published_at_most_once_a_step(monkeypatch):
    published = Counter()
    copy_to_uva = buffer_utils.UvaBackedTensor.copy_to_uva

    def counted(tensor, *args):
        published[id(tensor)] += 1
        return copy_to_uva(tensor, *args)

    worker = FakeGPUWorker(make_runner())
    monkeypatch.setattr(buffer_utils.UvaBackedTensor, "copy_to_uva", counted)
    for output, _ in busy_steps(1, 100):
        published.clear()
        worker.execute_model(output)
        assert max(published.values(), default=0) <= 1
    published.clear()
    worker.execute_model(step_output())
    assert not published, "nothing changed"
