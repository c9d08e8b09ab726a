"""The worker of vLLM's `SimpleCPUOffloadConnector` without a device, which copies rows of a made-up memory."""

from collections import deque
from typing import NamedTuple

from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.simple_kv_offload.metadata import SimpleCPUOffloadWorkerMetadata


class Copy(NamedTuple):
    """Blocks to copy from the GPU (`is_store`) or to it."""

    is_store: bool
    event: int
    gpu_blocks: list[int]
    cpu_blocks: list[int]


class Copies:
    """Carries out the copies of a step's metadata some steps later, as a GPU's copy streams do.

    Args:
        lag: Steps until a copy is complete.
        is_early: Whether it reads and writes when it is ordered, or else when it is complete. Both must give equal
            results.

    Attributes:
        memory: Maps blocks of the GPU and offsets in them to their contents.
        loaded: Blocks of the GPU that were loaded.
    """

    def __init__(self, lag: int = 0, is_early: bool = False) -> None:
        self.memory: dict[tuple[int, int], object] = {}
        self.loaded: set[int] = set()
        self.cpu_memory: dict[tuple[int, int], object] = {}
        self.lag = lag
        self.is_early = is_early
        self.num_stored = self.num_loaded = 0
        self._under_way: deque[tuple[int, Copy]] = deque()
        self._step = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._under_way)

    def transfer(self, output) -> KVConnectorOutput:
        """Takes a step's orders after its forward pass, and reports completed copies."""
        orders = output.kv_connector_metadata
        self._step += 1
        copies = [
            Copy(False, orders.load_event, orders.load_gpu_blocks, orders.load_cpu_blocks),
            Copy(True, orders.store_event, orders.store_gpu_blocks, orders.store_cpu_blocks),
        ]
        for copy in copies:
            if copy.event >= 0:
                self._under_way.append((self._step + self.lag, copy))
                if self.is_early:
                    self._carry_out(copy)
        done = KVConnectorOutput()
        stores = {}
        while self._under_way and self._under_way[0][0] <= self._step:
            _, copy = self._under_way.popleft()
            if not self.is_early:
                self._carry_out(copy)
            if copy.is_store:
                stores[copy.event] = 1
                self.num_stored += len(copy.gpu_blocks)
            else:
                done.finished_recving = {*(done.finished_recving or ()), *orders.load_event_to_reqs[copy.event]}
                self.num_loaded += len(copy.gpu_blocks)
        if stores:
            done.kv_connector_worker_meta = SimpleCPUOffloadWorkerMetadata(completed_store_events=stores)
        return done

    def _carry_out(self, copy: Copy) -> None:
        here, there = (self.memory, self.cpu_memory) if copy.is_store else (self.cpu_memory, self.memory)
        blocks = (copy.gpu_blocks, copy.cpu_blocks) if copy.is_store else (copy.cpu_blocks, copy.gpu_blocks)
        offsets = range(1 + max((offset for _, offset in here), default=-1))
        for source, target in zip(*blocks, strict=True):
            there.update({(target, offset): here.get((source, offset)) for offset in offsets})
        if not copy.is_store:
            self.loaded.update(copy.gpu_blocks)


def pinned(scheduler) -> list[int]:
    """Returns ids of blocks held for a copy, or until a step in flight is complete, one for each hold."""
    held = [block.block_id for _, blocks in scheduler.deferred_frees for block in blocks]
    manager = getattr(scheduler.connector, "scheduler_manager", None)
    if manager is not None:
        transfers = [*manager._store_event_to_blocks.values(), *manager._pending_finished_stores]
        transfers += [state.transfer_meta for state in manager._reqs_to_load.values()]
        held += [block_id for transfer in transfers for block_id in transfer.gpu_block_ids]
    return held
