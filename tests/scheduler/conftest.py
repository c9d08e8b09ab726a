"""A real scheduler without an engine: vLLM's config and block pool, made-up model outputs."""

import functools
import zlib
from collections import deque

import pytest
import torch


class Harness:
    """Schedules like the engine core does, with `depth` steps in flight, and keeps every step's output."""

    def __init__(self, scheduler, depth: int) -> None:
        self.scheduler = scheduler
        self.depth = depth
        self.in_flight: deque = deque()
        self.steps: list = []
        self.outputs: dict[str, list[int]] = {}
        self.usage: dict[str, dict[str, int]] = {}

    def add(self, req_id: str, num_prompt_tokens: int, max_tokens: int = 8, ratio: float | None = None, **extra):
        prompt = [zlib.crc32(req_id.encode()) % 1000] * num_prompt_tokens
        return self.submit(req_id, prompt, {**({} if ratio is None else {"kv_keep_ratio": ratio}), **extra}, max_tokens)

    def submit(self, req_id: str, prompt: list[int], extra_args: dict, max_tokens: int, stop_token: int = -1, **about):
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        request = Request(
            request_id=req_id,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(
                max_tokens=max_tokens, ignore_eos=True, stop_token_ids=[stop_token], extra_args=extra_args
            ),
            pooling_params=None,
            block_hasher=get_request_block_hasher(self.pool.hash_block_size, sha256),
            **about,
        )
        self.scheduler.add_request(request)
        return request

    def step(self):
        output = self.schedule()
        if len(self.in_flight) == self.depth:
            self.finish_one()
        return output

    def schedule(self):
        from vllm_l2kv.scheduler.integrity import check_block_conservation

        output = self.scheduler.schedule()
        check_block_conservation(self.scheduler.kv_cache_manager)
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
        )
        for client in self.scheduler.update_from_output(output, result).values():
            for out in client.outputs:
                self.outputs.setdefault(out.request_id, []).extend(out.new_token_ids)
                if out.kv_transfer_params:
                    self.usage[out.request_id] = out.kv_transfer_params["kv_cache"]

    def execute(self, output) -> list[list[int]]:
        """What a worker samples; put a worker's own method in its place to have one."""
        sampled = []
        for req_id in output.num_scheduled_tokens:
            request = self.scheduler.requests.get(req_id)
            prompt_done = request is not None and self.computed_after(output, req_id) >= request.num_tokens
            sampled.append([7] if prompt_done else [])
        return sampled

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
                self.step()  # tells the worker what has finished
                return
            self.step()
        raise AssertionError("still unfinished")

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def compressed(self):
        return self.scheduler._compressed[0]


@pytest.fixture(scope="session")
def make_harness(demo_model):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import (
        generate_scheduler_kv_cache_config,
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
        init_none_hash,
        resolve_kv_cache_block_sizes,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.structured_output import StructuredOutputManager

    import vllm_l2kv
    from vllm_l2kv.kv_cache_spec import classify_layers
    from vllm_l2kv.plugin import register
    from vllm_l2kv.scheduler.scheduler import L2KVScheduler
    from vllm_l2kv.settings import Settings

    register()
    init_none_hash(sha256)

    @functools.cache
    def configure(num_blocks: int, full_layers: tuple[int, ...], depth: int, num_layers: int, block_size: int, **given):
        given = {"max_num_batched_tokens": 64, "max_num_seqs": 64, "max_model_len": 2048, **given}
        engine_args = {**vllm_l2kv.engine_args(full_layers=full_layers), "block_size": block_size}
        config = EngineArgs(model=str(demo_model), **{**engine_args, **given}).create_engine_config()
        config.scheduler_config.async_scheduling = depth > 1
        config.cache_config.kv_cache_layout = "BLHNC"
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=8, dtype=torch.float32)
        specs = {f"model.layers.{i}.self_attn": spec for i in range(num_layers)}
        groups = get_kv_cache_groups(config, classify_layers(specs, Settings(full_layers)))
        bytes_per_block = max(
            sum(s.page_size_bytes for s in getattr(g.kv_cache_spec, "kv_cache_specs", {}).values())
            or g.kv_cache_spec.page_size_bytes * len(g.layer_names)
            for g in groups
        )
        worker_config = get_kv_cache_config_from_groups(config, groups, bytes_per_block * (num_blocks + 1))
        kv_cache_config = generate_scheduler_kv_cache_config([worker_config])
        config.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
        config.cache_config.block_size = block_size
        return config, kv_cache_config, *resolve_kv_cache_block_sizes(kv_cache_config, config)

    def make(
        num_blocks: int, full_layers=(0,), depth: int = 1, num_layers: int = 5, block_size: int = 16, **arguments
    ) -> Harness:
        config, kv_cache_config, scheduler_block_size, hash_block_size = configure(
            num_blocks, tuple(full_layers), depth, num_layers, block_size, **arguments
        )
        scheduler = L2KVScheduler(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=scheduler_block_size,
            hash_block_size=hash_block_size,
            log_stats=False,
        )
        harness = Harness(scheduler, depth)
        assert harness.pool.get_num_free_blocks() == num_blocks
        return harness

    return make
