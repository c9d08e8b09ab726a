"""Runner V2 and its worker without a GPU: vLLM's request states, block tables and ring of buffers, on the host.

On a GPU, kernels of a step read the host's buffers when the step's turn comes; here `Device` keeps what a step holds
and looks at it again whenever the host has prepared another step.
"""

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.worker_base import WorkerBase

from vllm_l2kv.messages import CompactionOrder, GroupMove, attach_orders
from vllm_l2kv.worker.clock import HostClock
from vllm_l2kv.worker.runner_v2 import RunnerV2
from vllm_l2kv.worker.worker import CompactionWorker

CPU = torch.device("cpu")
COMPRESSED, FULL = 0, 1  # groups


def patch_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets vLLM's ring of buffers live in host memory, by the class that its own CPU worker takes for that."""
    from vllm.v1.worker.cpu.buffer_utils import UvaBuffer

    monkeypatch.setattr(buffer_utils, "UvaBuffer", UvaBuffer)


def make_runner(max_num_reqs: int = 8, device: torch.device = CPU) -> SimpleNamespace:
    """What `RunnerV2` asks of vLLM's runner."""
    return SimpleNamespace(
        max_num_reqs=max_num_reqs,
        device=device,
        block_tables=BlockTables([4, 8], max_num_reqs, 64, [16, 8], device),
        attn_groups=[[], []],
        req_states=SimpleNamespace(req_id_to_index={}),
    )


def step_output(finished=(), preempted=(), orders=(), new=()) -> SimpleNamespace:
    """A step as the scheduler describes it, as far as the worker reads it; `new` pairs ids with states."""
    output = SimpleNamespace(finished_req_ids=set(finished), preempted_req_ids=set(preempted) or None, new=new)
    if orders:
        attach_orders(output, tuple(orders))
    return output


def order(req_id: str, num_evicted: int, destination: tuple[int, ...] = (1,)) -> CompactionOrder:
    move = GroupMove(COMPRESSED, (5, 6, 7), destination)
    return CompactionOrder(req_id, num_evicted + 1, 1, num_evicted + 1, 0, 0, "l2", "token", (move,))


class Device(WorkerBase):
    """Stands where vLLM's worker does: launches a step's kernels and waits for none of them.

    Attributes:
        in_flight: Of each step whose kernels have not run yet, counts as they will find them, and as they should.
    """

    def __init__(self, runner: Any, num_in_flight: int) -> None:
        self.model_runner = runner
        self.in_flight: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=num_in_flight)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        pass

    def execute_model(self, scheduler_output: Any) -> None:
        req_states = self.model_runner.req_states.req_id_to_index
        for req_id in (*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())):
            req_states.pop(req_id, None)
        req_states.update(scheduler_output.new)
        on_device = self._runner.counts.on_device
        self.in_flight.append((on_device, on_device.clone()))


class FakeGPUWorker(CompactionWorker, Device):
    """Our worker over `Device`, with a compactor that moves nothing."""

    def __init__(self, runner: Any, num_in_flight: int = 2) -> None:
        Device.__init__(self, runner, num_in_flight)
        self.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
        self.initialize_from_config(SimpleNamespace(kv_cache_groups=[]))

    def _make_compactor(self, layers):
        return SimpleNamespace(compact=lambda orders: None)

    def _make_clock(self):
        return HostClock()

    def _adapt_runner(self, group_ids):
        return RunnerV2(self.model_runner, [COMPRESSED])
