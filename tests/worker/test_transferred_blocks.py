"""Which bytes of a block a prefill/decode pair sends, by vLLM's worker without a transport."""

import os
from unittest.mock import MagicMock

import pytest
import torch
from bare_scheduler import plan
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_l2kv.worker.transfers import LayerByLayer, NixlConnector

NUM_BLOCKS = 6


@pytest.fixture
def connect(monkeypatch, llama):
    """Makes a worker's connector for these full layers and registers their caches."""
    monkeypatch.setattr(base_worker, "NixlWrapper", MagicMock())
    base_worker.NixlWrapper.return_value.get_agent_metadata.return_value = b""
    monkeypatch.setattr(base_worker, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(base_worker, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)

    def connect(full_layers, connector_class=NixlConnector):
        made = plan(llama, NUM_BLOCKS, full_layers, num_layers=12, block_size=32, kv_connector="NixlConnector")
        caches = allocate_kv_cache(made.kv_cache_config, torch.device("cpu"), KVCacheLayout.BLHNC)
        connector = connector_class(made.config, KVConnectorRole.WORKER, made.kv_cache_config)
        connector.register_kv_caches(caches)
        return connector.connector_worker, made.kv_cache_config.kv_cache_groups, caches

    return connect


def descriptors(worker) -> list[tuple[int, int]]:
    """First byte and length of each descriptor. vLLM 0.33 has one row for equally spaced ones."""
    found = []
    for begin, length, _, *run in worker.src_blocks_data.tolist():
        stride, count = run or (0, 1)
        found += [(begin + i * stride, length) for i in range(count)]
    return found


def lost_bytes(worker, groups, caches, block=2) -> int:
    """Bytes of a block that belong to some layer, but are not sent when that layer's group sends the block."""
    lost, known = 0, descriptors(worker)
    for group_id, group in enumerate(groups):
        asked = [[block] if i == group_id else [] for i in range(len(groups))]
        sent = worker._compute_desc_ids(asked, worker.num_blocks, 1, 1, worker.region_num_blocks)
        places = [(begin, begin + length) for begin, length in (known[i] for i in sent)]
        for name in group.layer_names:
            begin, end = caches[name][block].data_ptr(), caches[name][block].data_ptr() + caches[name][block].nbytes
            held = set(range(begin, end))
            lost += len(held.difference(*(range(*place) for place in places)))
    return lost


@pytest.mark.parametrize("full_layers", [(), (0, 1), (1,), (0, 9), (10, 11)], ids=str)
def test_every_layer_of_a_block_is_sent(connect, full_layers):
    assert lost_bytes(*connect(full_layers)) == 0


@pytest.mark.parametrize(("full_layers", "lost"), [((0, 1), False), ((1,), True), ((0, 9), True), ((10, 11), True)])
def test_upstream_loses_rows_of_full_layers_behind_compressed_ones(connect, full_layers, lost):
    """If this fails, `worker.transfers` may go."""
    assert bool(lost_bytes(*connect(full_layers, LayerByLayer))) == lost


def test_a_block_is_one_piece(connect):
    worker, _, caches = connect((0, 1))
    assert worker.block_len_per_layer == [caches["model.layers.0.self_attn"].stride(0) * 4]
