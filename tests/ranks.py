"""Functions that run on each rank's worker, of runner V1 or V2, and a load under which ranks are compared."""

import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import torch
from engine import Engine, keep

COLLECTIVE = re.compile(r"c10d|gloo|nccl|shm_|vllm::(all|reduce|gather)|custom_ar|cross_device_reduce")
"""Names of communication in a profile: operators and kernels of torch, NCCL and vLLM."""

NUM_SHARED_STARTS = 3

# Functions that run on ranks are pickled by value: ranks cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def state_of_rank(worker: Any) -> dict[str, Any]:
    """Returns evicted counts, and block tables by group, of every request that a rank holds."""
    if worker.use_v2_model_runner:
        return {"tables": tables_of_v2(worker.model_runner), "counts": counts_of_v2(worker)}
    return {"tables": tables_of_v1(worker.model_runner), "counts": worker.num_evicted()}


def tables_of_v1(runner: Any) -> dict[str, list[list[int]]]:
    """Returns the tables of the requests in the batch."""
    batch = runner.input_batch
    return {
        req_id: [
            table.block_table.np[row, : table.num_blocks_per_row[row]].tolist()
            for table in batch.block_table.block_tables
        ]
        for req_id, row in batch.req_id_to_index.items()
    }


def tables_of_v2(runner: Any) -> dict[str, list[list[int]]]:
    """Returns the tables of all requests, as on the device."""
    tables = runner.block_tables
    rows_of_group = [table.gpu.cpu() for table in tables.block_tables]
    return {
        req_id: [rows[state, : tables.num_blocks.np[i, state]].tolist() for i, rows in enumerate(rows_of_group)]
        for req_id, state in runner.req_states.req_id_to_index.items()
    }


def counts_of_v2(worker: Any) -> dict[str, int]:
    """Returns the counts of all compacted requests, as kernels read them."""
    on_device = worker.model_runner.block_tables._counts.on_device.tolist()
    states = worker.model_runner.req_states.req_id_to_index
    return {req_id: on_device[states[req_id]] for req_id in worker.num_evicted()}


def start_profile(worker: Any) -> None:
    """Starts to record every operator and kernel that a rank runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    worker.profile_of_test = torch.profiler.profile(activities=activities)
    worker.profile_of_test.start()


def stop_profile(worker: Any) -> dict[str, int]:
    """Returns the number of communications of a rank, by operation."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    worker.profile_of_test.stop()
    events = worker.profile_of_test.key_averages()
    return {event.key: event.count for event in events if COLLECTIVE.search(event.key)}


@dataclass
class MixedLoad:
    """Many concurrent requests of mixed lengths and rules, some of which are aborted.

    Half of the prompts begin at one of a few places of the text, so they find prefixes, whole and compacted.

    Attributes:
        text: Tokens to cut prompts from.
        rules: Their rules, as arguments of `engine.keep`.
        num_requests: Number of requests.
        num_aborted: Number of requests that are aborted after the eighth step, unless they have finished.
        max_prompt: Tokens of the longest prompt.
        num_tokens: Tokens of each answer.
        answers: Tokens of those that finished.
        looks: Number of comparisons of the ranks, the most requests seen on them, and the number of requests that found
            a compacted document or conversation.
    """

    text: list[int]
    rules: Sequence[dict[str, Any]]
    num_requests: int = 200
    num_aborted: int = 20
    max_prompt: int = 400
    num_tokens: int = 12
    answers: dict[str, list[int]] = field(default_factory=dict)
    looks: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        chance = random.Random(1)
        shared = [chance.randrange(2000) for _ in range(NUM_SHARED_STARTS)]
        starts = [chance.choice((chance.choice(shared), chance.randrange(2000))) for _ in range(self.num_requests)]
        self.prompts = [self.text[start : start + chance.randint(1, self.max_prompt)] for start in starts]
        self.chosen = [
            chance.choice([rule for rule in self.rules if rule.get("document", 0) < len(prompt)])
            for prompt in self.prompts
        ]
        self.aborted = [str(number) for number in chance.sample(range(self.num_requests), self.num_aborted)]

    def run(self, engine: Engine) -> None:
        """Runs until all have finished. After every third step all ranks and the pool must agree with the scheduler."""
        for i, (prompt, rule) in enumerate(zip(self.prompts, self.chosen, strict=True)):
            engine.add(str(i), prompt, keep(**rule, num_tokens=self.num_tokens))
        step = 0
        while engine.llm.llm_engine.has_unfinished_requests():
            step += 1
            if step == 8:
                self.looks["aborted"] = len([name for name in self.aborted if name not in self.answers])
                engine.llm.llm_engine.abort_request(self.aborted)
            finished = [output for output in engine.step() if output.finished]
            self.answers |= {output.request_id: list(output.outputs[0].token_ids) for output in finished}
            self._count_found(finished)
            if step % 3 == 0:
                self._compare_ranks(engine)
        engine.check_whole()

    def _count_found(self, finished: Sequence[Any]) -> None:
        for output in finished:
            if output.kv_transfer_params["kv_cache"].get("found_tokens"):
                has_document = self.chosen[int(output.request_id)].get("document") is not None
                self.looks["found documents" if has_document else "found conversations"] += 1

    def _compare_ranks(self, engine: Engine) -> None:
        first, *others = engine.llm.collective_rpc(state_of_rank)
        assert all(other == first for other in others)
        held = [request.request_id for request in engine.scheduler.running if request.request_id in first["tables"]]
        for req_id in held:
            tables = [[block.block_id for block in manager.req_to_blocks[req_id]] for manager in engine.managers]
            assert first["tables"][req_id] == tables, req_id
            assert first["counts"].get(req_id, 0) == engine.num_evicted(req_id), req_id
        self.looks["times"] += 1
        self.looks["held"] = max(self.looks["held"], len(held))
        self.looks["requests"] = max(self.looks["requests"], len(first["tables"]))
        self.looks["compacted"] = max(self.looks["compacted"], len(first["counts"]))
