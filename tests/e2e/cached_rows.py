"""The rows in an engine's cache, read as attention reads them."""

import torch
from engine import Engine
from vllm.model_executor.models.utils import extract_layer_index

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.scheduler.cache_manager import CompressedLayerManager
from vllm_l2kv.worker.rows import cpu_rows


class CachedRows:
    """Rows of requests, found by the worker's tables: `[num_kv_heads, num_rows, key and value]`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.runner = engine.worker.model_runner
        self.groups = [
            (
                group.kv_cache_spec.block_size,
                {extract_layer_index(name): self._rows(engine, name) for name in group.layer_names},
            )
            for group in self.runner.kv_cache_config.kv_cache_groups
        ]

    @staticmethod
    def _rows(engine: Engine, name: str):
        layer = engine.layers[name]
        return cpu_rows(layer.kv_cache, layer.head_size)

    def blocks(self, req_id: str, group_id: int, num_rows: int) -> list[int]:
        """Block ids in the request's state and, if it was in the last step, in the batch that attention reads."""
        blocks = self.runner.requests[req_id].block_ids[group_id][: num_blocks_for(num_rows, self.groups[group_id][0])]
        row = self.runner.input_batch.req_id_to_index.get(req_id)
        if row is not None:
            table = self.runner.input_batch.block_table[group_id].get_numpy_array()
            assert table[row, : len(blocks)].tolist() == blocks
        return blocks

    def of(self, req_id: str, num_tokens: int, num_evicted: int) -> dict[int, torch.Tensor]:
        """Returns copies of a request's rows by layer; compressed layers lack the evicted tokens."""
        found = {}
        for group_id, (manager, (_, layers)) in enumerate(zip(self.engine.managers, self.groups, strict=True)):
            num_rows = num_tokens - num_evicted * isinstance(manager, CompressedLayerManager)
            blocks = self.blocks(req_id, group_id, num_rows)
            for layer, rows in layers.items():
                both = torch.cat([rows.keys[blocks], rows.values[blocks]], dim=-1)
                found[layer] = both.transpose(0, 1).flatten(1, 2)[:, :num_rows]
        return found
