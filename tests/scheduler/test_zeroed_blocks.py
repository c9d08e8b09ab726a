"""On GPUs vLLM zeroes new blocks; that rows after a request's last one are empty, `test_state_machine` checks."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
from bare_scheduler import plan
from fake_gpu import FakeGPUWorker
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_l2kv import kv_cache_spec


@pytest.fixture(params=["CPU", "GPU"])
def zeroes(request, monkeypatch) -> bool:
    on_cpu = request.param == "CPU"
    monkeypatch.setattr(kv_cache_spec, "current_platform", SimpleNamespace(is_cpu=lambda: on_cpu))
    return not on_cpu


def vllms_own(config: KVCacheConfig) -> KVCacheConfig:
    return KVCacheConfig(**{field.name: getattr(config, field.name) for field in fields(KVCacheConfig)})


def test_the_scheduler_names_new_blocks(demo_model, zeroes):
    made = plan(demo_model, 20)
    config = vllms_own(made.kv_cache_config)
    assert not config.needs_kv_cache_zeroing
    scheduler = made._replace(kv_cache_config=config).make()
    assert scheduler.needs_kv_cache_zeroing == zeroes
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    assert [manager.records_new_block_ids for manager in managers] == [zeroes] * 2
    assert vllms_own(scheduler.kv_cache_config) == config


def test_the_worker_prepares_for_them(zeroes, monkeypatch):
    class PreparedError(Exception):
        pass

    def initialize_from_config(self, kv_cache_config):
        raise PreparedError(kv_cache_config.needs_kv_cache_zeroing)

    monkeypatch.setattr("fake_gpu.Device.initialize_from_config", initialize_from_config)
    with pytest.raises(PreparedError, match=str(zeroes)):
        FakeGPUWorker(runner=None)
