"""The GPU worker without a GPU."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import order, step_output
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker
from weights import made_up_weights

from vllm_l2kv.kernels.scratch import scratch_bytes
from vllm_l2kv.kv_cache_spec import FLASH_ATTENTION, CompressedLayerSpec, FullLayerSpec
from vllm_l2kv.messages.orders import seconds_of
from vllm_l2kv.settings import Settings
from vllm_l2kv.worker.gpu import L2KVGPUWorker
from vllm_l2kv.worker.worker import CompactionWorker

SHAPE = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.bfloat16}
MAX_MODEL_LEN = 1000


@pytest.fixture
def worker() -> L2KVGPUWorker:
    worker = object.__new__(L2KVGPUWorker)
    worker.vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_memory_bytes=None, user_specified_block_size=False),
        model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN),
    )
    worker._weights = None
    worker.settings = Settings(profile="p.safetensors")
    return worker


@pytest.mark.parametrize("asked", [None, 1 << 30])
def test_the_kernels_memory_is_subtracted_from_the_caches(worker, monkeypatch, asked):
    """An explicit size of the cache is unchanged."""
    specs = {"a": CompressedLayerSpec(**SHAPE), "b": FullLayerSpec(**SHAPE), "c": CompressedLayerSpec(**SHAPE)}
    monkeypatch.setattr(CompactionWorker, "get_kv_cache_spec", lambda _: specs)
    monkeypatch.setattr(Worker, "determine_available_memory", lambda _: 2 << 30)
    worker.vllm_config.cache_config.kv_cache_memory_bytes = asked
    assert worker.get_kv_cache_spec() is specs
    needed = scratch_bytes(2 + 2, SHAPE["head_size"], MAX_MODEL_LEN)
    assert worker.determine_available_memory() == (2 << 30) - (0 if asked else needed)


def test_the_weights_of_a_profile_are_subtracted_too(worker, monkeypatch):
    specs = {"a": CompressedLayerSpec(**SHAPE), "b": FullLayerSpec(**SHAPE), "c": CompressedLayerSpec(**SHAPE)}
    monkeypatch.setattr(CompactionWorker, "get_kv_cache_spec", lambda _: specs)
    monkeypatch.setattr(Worker, "determine_available_memory", lambda _: 2 << 30)
    left = []
    for worker._weights in (None, made_up_weights(3, 4, 8)):
        worker.get_kv_cache_spec()
        left.append(worker.determine_available_memory())
    num_features = 4 + 2 + 8 + 2
    of_a_head = 2 * num_features * 64 + 4 * 64 + 4 * 64 + 2 * num_features + 4
    assert left[0] - left[1] == (2 + 2) * of_a_head


def test_an_explicit_block_size_is_unchanged(worker):
    assert worker._geometry() == FLASH_ATTENTION
    worker.vllm_config.cache_config.user_specified_block_size = True
    assert worker._geometry() == replace(FLASH_ATTENTION, page=0)


class Later(AsyncModelRunnerOutput):
    def __init__(self, output):
        self.output = output

    def get_output(self):
        return self.output

    def get_kv_connector_output(self):
        return None


def test_a_step_compacts_and_updates_the_runner_before_vllm_prepares_it(worker, monkeypatch):
    done = []
    worker._compactors = [SimpleNamespace(compact=lambda orders: done.append(("compact", len(orders))))]
    worker._runner = SimpleNamespace(begin_step=lambda step: done.append((sorted(step.gone), len(step.orders))))
    worker._clock = FakeClock()
    monkeypatch.setattr(Worker, "execute_model", lambda _, output: done.append("vLLM"))
    assert worker.execute_model(step_output(["b"], ["a"], [order("r", 4)])) is None
    assert worker.execute_model(step_output()) is None
    assert done == [("compact", 1), (["a", "b"], 1), "vLLM", ([], 0), "vLLM"]


class FakeClock:
    """Has measured one compaction that is not yet reported."""

    def __init__(self) -> None:
        self.seconds = [0.5]

    def measure(self):
        return nullcontext()

    def take(self):
        seconds, self.seconds = self.seconds, []
        return seconds


@pytest.mark.parametrize("is_async", [True, False])
def test_times_are_attached_to_one_output(worker, monkeypatch, is_async):
    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    monkeypatch.setattr(Worker, "sample_tokens", lambda *_: Later(output) if is_async else output)
    worker._clock = FakeClock()
    first, second = worker.sample_tokens(None), worker.sample_tokens(None)
    assert isinstance(first, AsyncModelRunnerOutput) == is_async
    if is_async:
        first, second = first.get_output(), second.get_output()
    assert seconds_of(first) == [0.5]
    assert second is output
    assert seconds_of(output) == []


def test_an_early_pipeline_rank_keeps_no_times(worker, monkeypatch):
    """It has no output to attach them to. Between the two calls of a step there is no output either, and times stay."""
    worker._compactors, worker._runner = [], SimpleNamespace(begin_step=lambda *_: None)
    worker._clock = FakeClock()
    monkeypatch.setattr(Worker, "execute_model", lambda *_: None)
    monkeypatch.setattr(Worker, "sample_tokens", lambda *_: None)
    assert worker.execute_model(step_output()) is None
    assert worker._clock.seconds == [0.5]
    assert worker.sample_tokens(None) is None
    assert worker._clock.seconds == []
