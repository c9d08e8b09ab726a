"""A real vLLM engine in this process, with its inside open to tests."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import parallel_state
from vllm.model_executor.layers import rotary_embedding
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

import vllm_l2kv
from vllm_l2kv.scheduler.integrity import check_block_conservation, check_nothing_left, num_evicted

VOCABULARY = range(3, 49152)


def bare_rule(**arguments: Any) -> dict[str, Any]:
    """Engine arguments without protection by default: tests of the rule name all that they want."""
    return vllm_l2kv.engine_args(protect_first=0, protect_last=0, **arguments)


def greedy(num_tokens: int = 12, extra_args: dict[str, Any] | None = None, **arguments: Any) -> SamplingParams:
    arguments = {"temperature": 0.0, "ignore_eos": True, **arguments}
    return SamplingParams(max_tokens=num_tokens, extra_args=extra_args, **arguments)


def keep(
    ratio: str | float,
    first: int = 0,
    last: int = 0,
    num_tokens: int = 12,
    budget: int | None = None,
    scorer: str | None = None,
    document: int | None = None,
    **arguments: Any,
) -> SamplingParams:
    fields = vllm_l2kv.compression(
        float(ratio),
        max_tokens=budget,
        protect_first=first,
        protect_last=last,
        scorer=scorer,
        prefix_tokens=document,
    )
    return greedy(num_tokens, fields, **arguments)


def draw(chance: random.Random, length: int) -> list[int]:
    """Tokens, none of them twice."""
    return chance.sample(VOCABULARY, length)


def tokens_of(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


class Engine:
    def __init__(self, model: Path, **arguments: Any) -> None:
        self.llm = LLM(str(model), disable_log_stats=True, **arguments)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.kv_cache_manager = self.scheduler.kv_cache_manager
        self.pool = self.kv_cache_manager.block_pool

    @property
    def worker(self) -> Any:
        return self.core.model_executor.driver_worker.worker

    @property
    def layers(self) -> dict[str, Any]:
        """vLLM's attention layers by name, and layers of experts."""
        return self.worker.vllm_config.compilation_config.static_forward_context

    @property
    def caches(self) -> list[torch.Tensor]:
        """Tensors of rows and states."""
        caches = (getattr(layer, "kv_cache", ()) for layer in self.layers.values())  # experts have none
        return [each for cache in caches for each in (cache if isinstance(cache, (tuple, list)) else (cache,))]

    @property
    def has_ranks(self) -> bool:
        """Whether its workers are processes of their own."""
        return isinstance(self.core.model_executor, MultiprocExecutor)

    def shutdown(self) -> None:
        self.core.shutdown()

    def spoil(self) -> None:
        """Fills the empty cache with NaN, all but the null block, which nothing writes."""
        for cache in self.caches:
            cache[1:] = math.nan

    def free_memory(self) -> None:
        """Takes away weights and cache, which references from elsewhere may keep for long; not of ranks."""
        for tensor in (*self.worker.model_runner.model.parameters(), *self.caches):
            tensor.untyped_storage().resize_(0)

    # --- whole requests

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Any]:
        """Runs all at once; the pool must be whole afterwards."""
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(requests, list(params), use_tqdm=False)
        self.check_whole()
        return outputs

    def tokens(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self.generate(prompts, params)]

    def fresh_tokens(self, prompt: Sequence[int], params: SamplingParams) -> list[int]:
        """One request on its own, with nothing in the prefix cache."""
        assert self.kv_cache_manager.reset_prefix_cache()
        return self.tokens([prompt], [params])[0]

    # --- step by step

    def add(self, req_id: str, prompt: Sequence[int], params: SamplingParams, priority: int = 0) -> str:
        """Adds a request and returns the engine's own id for it."""
        before = set(self.scheduler.requests)
        self.llm.llm_engine.add_request(req_id, {"prompt_token_ids": list(prompt)}, params, priority=priority)
        (added,) = set(self.scheduler.requests) - before
        return added

    def step(self) -> list[Any]:
        outputs = self.llm.llm_engine.step()
        check_block_conservation(self.kv_cache_manager)
        return outputs

    def drain(self, max_steps: int = 2000) -> dict[str, Any]:
        """Steps until nothing is left; the last output of each request by its id."""
        last: dict[str, Any] = {}
        for _ in range(max_steps):
            if not self.llm.llm_engine.has_unfinished_requests():
                # One more step tells the worker what has finished.
                return last
            last.update({output.request_id: output for output in self.step()})
        raise AssertionError(f"requests still unfinished after {max_steps} steps")

    def num_evicted(self, req_id: str) -> int:
        """0 unless the request is compacted."""
        return num_evicted(self.scheduler, req_id)

    # --- blocks

    @property
    def managers(self) -> tuple[SingleTypeKVCacheManager, ...]:
        return self.kv_cache_manager.coordinator.single_type_managers

    def num_blocks(self, req_id: str) -> list[int]:
        """Blocks that a request holds, per group."""
        return [len(manager.req_to_blocks.get(req_id, ())) for manager in self.managers]

    @property
    def num_usable_blocks(self) -> int:
        return self.pool.num_gpu_blocks - 1  # one is vLLM's null block

    def check_whole(self) -> None:
        check_block_conservation(self.kv_cache_manager)
        assert self.pool.get_num_free_blocks() == self.num_usable_blocks

    @contextmanager
    def emptied(self) -> Iterator[None]:
        """The engine with nothing in its cache; afterwards no request may have left anything."""
        assert self.kv_cache_manager.reset_prefix_cache()
        yield
        self.step()  # tells the worker what has finished
        check_nothing_left(self.scheduler)
        self.check_whole()
        assert self.worker.num_evicted() == {}

    @contextmanager
    def pool_of(self, num_free: int) -> Iterator[None]:
        """The same engine with a cache of `num_free` blocks and nothing in it."""
        assert self.kv_cache_manager.reset_prefix_cache()
        with self.filled_up(num_free):
            yield

    @contextmanager
    def filled_up(self, num_free: int) -> Iterator[None]:
        """Somebody else holds all free blocks but `num_free`; what requests hold and share stays."""
        tables = self.managers[0].req_to_blocks
        tables["somebody else"] = self.pool.get_new_blocks(self.pool.get_num_free_blocks() - num_free)
        try:
            yield
        finally:
            self.pool.free_blocks(tables.pop("somebody else"))


def undo_traces() -> None:
    """Takes away what earlier engines in this process left in modules of vLLM and later ones would stumble over.

    vLLM makes its groups of ranks with the first engine of a process, and the one for experts only if that engine's
    model has experts. Later engines take the groups they find, and a model with experts fails without this one.

    vLLM also keeps rotary embeddings for later models, and its ERNIE 4.5 changes one of them.
    """
    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        world = parallel_state.get_world_group()
        backend = torch.distributed.get_backend(world.device_group)
        parallel_state._EP = parallel_state.init_model_parallel_group(
            [world.ranks], world.local_rank, backend, group_name="ep"
        )
    rotary_embedding._ROPE_DICT.clear()


@contextmanager
def running(model: Path, full_layers: tuple[int, ...] | None = (0,), **arguments: Any) -> Iterator[Engine]:
    """An engine for a while; without us if `full_layers` is `None`.

    One in this process is dropped, not shut down: that would take away the process groups of every other engine here.
    So would vLLM's finalizer, at whatever moment the garbage collector comes by.
    """
    ours = {"block_size": 32} if full_layers is None else bare_rule(full_layers=full_layers)
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": 800,
        "seed": 0,
    }
    undo_traces()
    engine = Engine(model, **{**defaults, **ours, **arguments})
    engine.llm.llm_engine.engine_core._finalizer.detach()
    try:
        yield engine
    finally:
        if engine.has_ranks:
            engine.shutdown()
        else:
            engine.free_memory()
