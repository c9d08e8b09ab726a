"""A real scheduler without an engine: vLLM's config and block pool, made-up model outputs."""

import functools
import zlib
from collections import deque

import pytest


class Harness:
    """Schedules as the engine core does, with `depth` steps in flight, and keeps every step's output."""

    def __init__(self, scheduler, depth: int) -> None:
        self.scheduler = scheduler
        self.depth = depth
        self.in_flight: deque = deque()
        self.steps: list = []
        self.outputs: dict[str, list[int]] = {}
        self.usage: dict[str, dict[str, int | str]] = {}
        self.received: list = []  # every output, in order
        self.finish_reasons: dict[str, str] = {}

    def add(self, req_id: str, num_prompt_tokens: int, max_tokens: int = 8, ratio: float | None = None, **extra):
        prompt = [zlib.crc32(req_id.encode()) % 1000] * num_prompt_tokens
        return self.submit(req_id, prompt, {**({} if ratio is None else {"kv_keep_ratio": ratio}), **extra}, max_tokens)

    def submit(
        self,
        req_id: str,
        prompt: list[int],
        extra_args: dict | None,
        max_tokens: int,
        stop_token: int = -1,
        skip_reading_prefix_cache: bool = False,
        **about,
    ):
        from bare_scheduler import add_request
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            stop_token_ids=[stop_token],
            extra_args=extra_args,
            skip_reading_prefix_cache=skip_reading_prefix_cache,
        )
        return add_request(self.scheduler, req_id, prompt, params, **about)

    def step(self):
        output = self.schedule()
        if len(self.in_flight) == self.depth:
            self.finish_one()
        return output

    def schedule(self):
        from cpu_copies import pinned

        from vllm_l2kv.scheduler.integrity import check_block_conservation, check_requests

        output = self.scheduler.schedule()
        check_block_conservation(self.scheduler.kv_cache_manager, pinned(self.scheduler))
        check_requests(self.scheduler)
        self.steps.append(output)
        self.in_flight.append(output)
        return output

    def finish_one(self) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.in_flight.popleft()
        req_ids = list(output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
            sampled_token_ids=self.execute(output),
            kv_connector_output=self.transfer(output),
        )
        for client in self.scheduler.update_from_output(output, result).values():
            self.received += client.outputs
            for out in client.outputs:
                self.outputs.setdefault(out.request_id, []).extend(out.new_token_ids)
                if out.finished:
                    self.finish_reasons[out.request_id] = str(out.finish_reason)
                if out.kv_transfer_params:
                    self.usage[out.request_id] = out.kv_transfer_params["kv_cache"]
        if self.depth == 1 and self.scheduler.num_spec_tokens:
            self._draft(req_ids)

    def _draft(self, req_ids: list[str]) -> None:
        """Without async scheduling vLLM gives the drafts to its scheduler; there may be fewer or none."""
        from vllm.v1.outputs import DraftTokenIds

        chances = [zlib.crc32(f"{req_id} {len(self.steps)}".encode()) for req_id in req_ids]
        drafts = [[7] * (chance % (self.scheduler.num_spec_tokens + 1)) for chance in chances]
        self.scheduler.update_draft_token_ids(DraftTokenIds(req_ids, drafts))

    def execute(self, output) -> list[list[int]]:
        """Returns a worker's samples; replace it by a worker's method to have a worker."""
        sampled = []
        for req_id in output.num_scheduled_tokens:
            request = self.scheduler.requests.get(req_id)
            prompt_done = request is not None and self.computed_after(output, req_id) >= request.num_tokens
            sampled.append([7] if prompt_done else [])
        return sampled

    def transfer(self, output):
        """Returns the report of a KV connector's worker; replace it by its method to have one."""

    @staticmethod
    def computed_after(output, req_id: str) -> int:
        for new in output.scheduled_new_reqs:
            if new.req_id == req_id:
                return new.num_computed_tokens + output.num_scheduled_tokens[req_id]
        cached = output.scheduled_cached_reqs
        return cached.num_computed_tokens[cached.req_ids.index(req_id)] + output.num_scheduled_tokens[req_id]

    def run(self, max_steps: int = 500) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished_requests():
                while self.in_flight:
                    self.finish_one()
                self.step()  # so that the worker forgets finished requests
                return
            self.step()
        raise AssertionError("still unfinished")

    def run_until(self, happened, max_steps: int = 100) -> None:
        for _ in range(max_steps):
            if happened():
                return
            self.step()
        raise AssertionError("it did not happen")

    def preempted(self) -> list[str]:
        """Returns ids of preempted requests, in the order of steps."""
        return [req_id for output in self.steps for req_id in output.preempted_req_ids or ()]

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def compressed(self):
        from vllm_l2kv.scheduler.integrity import compressed_managers

        return compressed_managers(self.scheduler)[0]


@pytest.fixture(scope="session")
def make_harness(demo_model):
    from bare_scheduler import plan

    planned = functools.cache(functools.partial(plan, demo_model))
    given = {"max_num_batched_tokens": 64, "max_num_seqs": 64, "max_model_len": 2048}

    def make(num_blocks: int, full_layers=(0,), depth: int = 1, log_stats: bool = False, **arguments) -> Harness:
        arguments = {**given, "is_async": depth > 1, **arguments}
        what = planned(num_blocks, full_layers if full_layers is None else tuple(full_layers), **arguments)
        harness = Harness(what.make(log_stats), depth)
        assert harness.pool.get_num_free_blocks() == num_blocks
        return harness

    return make
