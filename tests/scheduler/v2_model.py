"""The worker without a model, combined with the real worker over vLLM's states and tables of runner V2.

The model knows where every row of a request is. The arguments of each step's kernels must agree.
"""

from fake_gpu import FakeGPUWorker, StatefulRunner
from vllm.v1.worker.gpu import buffer_utils
from worker_model import WorkerModel

MAX_NUM_REQS, MAX_NUM_TOKENS, MAX_MODEL_LEN = 6, 16, 96


class RunnerV2Model(WorkerModel):
    """Executes steps, and compares tables, slots and lengths of every scheduled request.

    Args:
        block_sizes: Tokens in a block, by group.
        compressed: Groups that are compacted.
        passed, recurrent: As for `WorkerModel`.
        num_in_flight: Maximum number of steps in flight.
    """

    def __init__(self, block_sizes: list[int], compressed: set[int], passed, recurrent, num_in_flight: int) -> None:
        super().__init__(block_sizes, compressed, passed, recurrent)
        buffer_utils.set_default_max_concurrency(num_in_flight)  # as vLLM's runner does
        runner = StatefulRunner(
            block_sizes=block_sizes,
            max_num_reqs=MAX_NUM_REQS,
            max_model_len=MAX_MODEL_LEN,
            max_num_tokens=MAX_NUM_TOKENS,
        )
        self._gpu = FakeGPUWorker(runner, sorted(compressed), num_in_flight)

    def execute(self, output) -> list[list[int]]:
        sampled = super().execute(output)
        self._gpu.model_runner.num_computed = self.begun
        self._gpu.execute_model(output)
        self._gpu.check_in_flight()
        if self._gpu.seen is not None:
            for i, req_id in enumerate(self._gpu.seen.req_ids):
                for group in range(len(self._block_sizes)):
                    self._compare(i, req_id, group, output.num_scheduled_tokens[req_id])
        return sampled

    def _compare(self, i: int, req_id: str, group: int, num_tokens: int) -> None:
        seen, size = self._gpu.seen, self._block_sizes[group]
        table, num_rows = self._states[req_id].tables[group], self.begun[req_id] + num_tokens
        if group in self._compressed:
            num_rows -= self._states[req_id].num_evicted
        assert seen.tables[group][i, : len(table)].tolist() == table, f"{req_id}: table of group {group}"
        assert not seen.tables[group][i, len(table) :].any(), f"{req_id}: blocks after its table"
        assert int(seen.metadata[group].seq_lens[i]) == num_rows, f"{req_id}: length of group {group}"
        if group in self._recurrent:
            return  # its kernels take the state's block from the table
        found = [self._where(req_id, group, slot) for slot in range(num_rows - num_tokens, num_rows)]
        slots = [block * size + offset for block, offset in found]
        assert seen.slots[req_id][group].tolist() == slots, f"{req_id}: slots of group {group}"
