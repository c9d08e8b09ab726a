"""Compiles the kernels for a GPU on machines without one: Triton and its assembler need no device for that.

The interpreter takes code that the compiler refuses, such as operands of different types.
"""

import pytest
import torch
from head_pool import HEAD, HEADS, VALUE, Pool, pages_of
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from weights import made_up_weights

from vllm_l2kv.kernels import slots
from vllm_l2kv.kernels.group_cache import GroupCache
from vllm_l2kv.kernels.head_pages import Sequences
from vllm_l2kv.kernels.scratch import Scratch
from vllm_l2kv.kernels.triton_compactor import TritonCompactor
from vllm_l2kv.scorers import Heads, bind

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton.py runs the compiled kernels here"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
HOPPER = GPUTarget("cuda", 90, 32)
CPU = torch.device("cpu")


class NoDevice:
    """Stands in for Triton's driver of a GPU."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """Makes each launch only compile its kernel; collects the kernels' names."""
    kernels: set[str] = set()
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        kernels.add(kernel.metadata.name)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", NoDevice())
    return kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_compaction(compiled, dtype):
    """All that an engine warms up."""
    stored = torch.uint8 if dtype.itemsize == 1 else dtype
    cache = GroupCache.of(list(torch.zeros(2, 8, 2, 16, 256, dtype=stored)), 128, dtype)
    scorers = bind(Heads.of_rank(range(2), 2, 0, 1, CPU), made_up_weights(2, 2, 128))
    TritonCompactor(cache, scorers, 0, Scratch.of(cache.num_selections, 128, 10_000, CPU)).warm_up()
    assert {"_score_kernel", "_neighbors_kernel", "_blocks_kernel", "_select_kernel", "_move_kernel"} <= compiled


def test_slots(compiled):
    requests, states = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    of_groups = {
        "is_compressed": requests,
        "table_pointers": torch.zeros(4, dtype=torch.uint64),
        "table_strides": states,
        "block_sizes": requests,
        "has_slots": torch.ones(4, dtype=torch.bool),
    }
    tokens = torch.zeros(9, dtype=torch.int64)
    starts = torch.zeros(5, dtype=torch.int32)
    slots.slot_mappings(torch.zeros(4, 9, dtype=torch.int64), states, starts, tokens, requests, **of_groups)
    slots.physical_lengths(requests, requests, states, requests)
    assert {"_slot_mappings_kernel", "_physical_lengths_kernel"} <= compiled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_pages_of_heads(compiled, dtype):
    pool = Pool(dtype)
    keys, values = (torch.zeros(4, HEADS, size, dtype=torch.bfloat16) for size in (HEAD, VALUE))
    out, one = Sequences.of(4 * HEADS, 30, CPU), torch.ones(1)
    pages_of(pool, 0).write(out, keys, values, pool.held("full"), pool.held("compressed"), one, one)
    assert "_write_kernel" in compiled
