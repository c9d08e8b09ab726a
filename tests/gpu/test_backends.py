"""Attention backends other than FlashAttention 3 on a GPU: bf16, CUDA graphs, an engine for each backend.

Tiny models with random weights, compared as in `test_tiny_models`. Here full heads need a call for each class.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from agreement import cases_of, check_rules
from engine import bare_rule
from reference import Reference
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

from vllm_l2kv.worker.gpu import L2KVGPUWorker
from vllm_l2kv.worker.heads import SplitAttention

pytestmark = pytest.mark.gpu

INTERVALS = (300, 5)
RULES = (
    {"ratio": "1.0"},
    {"ratio": "0.5"},
    {"ratio": "0.2", "first": 4, "last": 16},
    {"ratio": "1", "budget": 96, "first": 4, "last": 32},
    {"ratio": "0.3", "document": 200},
)
LENGTHS = (33, 449, 1000, 1700)


class Kind(NamedTuple):
    """An attention backend and the engine's other arguments.

    `is_open` says whether users may choose the backend; these tests also allow those that users may not.
    """

    backend: str
    changes: dict[str, Any]
    full_layers: tuple[int, ...]
    full_heads: dict[int, tuple[int, ...]]
    is_open: bool = True


KINDS = {
    "triton": Kind("TRITON_ATTN", {}, (0,), {2: (1,)}),
    "fa4": Kind("FLASH_ATTN", {"head_dim": 512}, (0,), {2: (1,)}),
    # Its native path plans by lengths on the host. Its kernels read blocks of up to 64 tokens, so no layer is full.
    "flashinfer": Kind("FLASHINFER", {"head_dim": 64}, (), {}, is_open=False),
}


COMPILED = {"fa4": pytest.mark.filterwarnings("ignore")}
"""CUTLASS gives several kinds of warnings when it compiles FlashAttention 4."""


def reason_to_skip(kind: str) -> str | None:
    if kind == "fa4" and get_flash_attn_version(head_size=512) != 4:
        return "vLLM's FlashAttention 4 does not run here"
    if kind == "flashinfer" and find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    return None


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=COMPILED.get(kind, ())) for kind in KINDS])
def kind(request):
    if reason := reason_to_skip(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def model(kind, tiny_model):
    return tiny_model("llama", initializer_range=0.06, **KINDS[kind].changes)


@pytest.fixture(scope="module")
def engine(kind, model, start_small):
    asked = KINDS[kind]
    rule = bare_rule(
        full_layers=asked.full_layers,
        full_heads=asked.full_heads,
        prompt_interval=INTERVALS[0],
        answer_interval=INTERVALS[1],
    )
    sizes = {"compilation_config": {"cudagraph_capture_sizes": [1, 8, 32]}, "kv_cache_memory_bytes": 1 << 29}
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not asked.is_open:
            monkeypatch.setattr(L2KVGPUWorker, "attention_backends", (asked.backend,))
        engine = start_small(
            model,
            max_num_seqs=32,
            max_num_batched_tokens=2048,
            **sizes,
            **{**rule, "attention_backend": asked.backend},
        )
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def references(kind, model):
    """The references in fp32 and in bf16."""
    full = dict(KINDS[kind].full_heads)
    return [Reference(model, dtype, "cuda", None, full) for dtype in (torch.float32, torch.bfloat16)]


def test_the_engine_uses_the_chosen_backend(kind, engine):
    asked = KINDS[kind]
    layers = [engine.layers[f"model.layers.{i}.self_attn.attn"] for i in range(4)]
    assert {layer.attn_backend.get_name() for layer in layers} == {asked.backend}
    assert [i for i, layer in enumerate(layers) if type(layer.impl) is SplitAttention] == [*asked.full_heads]


def test_answers(kind, engine, references, text_ids):
    """All cases in one batch, twice: the second time with the prefix cache of the first."""
    cases = cases_of(text_ids, LENGTHS, RULES)
    asked = {"full_layers": KINDS[kind].full_layers, "intervals": INTERVALS, "num_tokens": 24}
    for _ in range(2):
        print(f"{kind}: {check_rules(engine, references, cases, **asked)}")
    engine.step()  # so that the worker forgets finished requests
    assert engine.worker.num_evicted() == {}
