"""Models with layers of several kinds, with experts and others, on a GPU: bf16, CUDA graphs, async scheduling.

Tiny models with random weights, of architectures that vLLM's CPU kernels support and of others. Compared as in
`test_engine`, by how much bf16 changes the reference.
"""

from collections.abc import Mapping
from copy import copy
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from agreement import cases_of, check_rules
from engine import bare_rule
from tiny import ChunkedReference, HybridReference, TokenwiseReference
from vllm.config import CompilationMode, CUDAGraphMode, set_current_vllm_config

pytestmark = pytest.mark.gpu

INTERVALS = (300, 5)
RULES = (
    {"ratio": "1.0"},
    {"ratio": "0.5"},
    {"ratio": "0.2", "first": 4, "last": 16},
    {"ratio": "1", "budget": 96, "first": 4, "last": 32},
    {"ratio": "0.5", "budget": 200},
    {"ratio": "0.3", "document": 200},
)
LENGTHS = (33, 449, 1000, 1700)


class Kind(NamedTuple):
    """The full layers of the setting, those of the model, and the model's differences from tests on CPUs.

    `arguments` are the engine's.
    """

    named: tuple[int, ...]
    full_layers: tuple[int, ...]
    changes: dict[str, Any]
    graphs: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE
    reference: type[HybridReference] = HybridReference
    lengths: tuple[int, ...] = LENGTHS
    arguments: Mapping[str, Any] = MappingProxyType({})


SMALL = {"initializer_range": 0.06}
"""Scale of the weights, since large ones amplify rounding to bf16's eight bits."""
UNTIED = {**SMALL, "tie_word_embeddings": False}
"""Changes of models whose embeddings vLLM never ties."""
SEVERAL_HEADS = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
"""Changes of LFM2, which has one head on CPUs."""
KINDS = {
    # With every expert chosen, since rounding could decide a choice, and kernels that need no FlashInfer.
    "qwen3_next": Kind((0, 1), (1,), {**UNTIED, "num_experts_per_tok": 4}, arguments={"gdn_prefill_backend": "triton"}),
    "nemotron_h": Kind((0, 1), (3,), SMALL),
    "lfm2": Kind((), (), SEVERAL_HEADS),
    "granite_hybrid": Kind((3,), (3,), SMALL),
    # Its reference is slow.
    "jamba": Kind((0, 1), (1,), UNTIED, reference=TokenwiseReference, lengths=LENGTHS[:2]),
    "gpt_oss": Kind((0, 1), (1,), {"initializer_range": 0.15, "num_experts_per_tok": 4}),
    "qwen3_5": Kind((0, 1), (1,), SMALL, arguments={"gdn_prefill_backend": "triton"}),
    "lfm2_moe": Kind((), (), {**SEVERAL_HEADS, "num_experts_per_tok": 4}),
    # Logits of these two hardly depend on the rule with smaller weights.
    "glm4_moe": Kind((0, 1), (0, 1), {"initializer_range": 0.15, "num_experts_per_tok": 4}),
    "gpt_neox": Kind((0,), (0,), {"initializer_range": 0.15}),
    "gemma3n": Kind((0, 1), (1,), SMALL),
    # vLLM captures attention by chunks in no graph.
    "llama4": Kind((0, 1), (1,), SMALL, CUDAGraphMode.PIECEWISE, ChunkedReference),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, tiny_model):
    return tiny_model(kind, **KINDS[kind].changes)


@pytest.fixture(scope="module")
def engine(kind, model, start_small):
    rule = bare_rule(full_layers=KINDS[kind].named, prompt_interval=INTERVALS[0], answer_interval=INTERVALS[1])
    sizes = {"compilation_config": {"cudagraph_capture_sizes": [1, 8, 32]}, "kv_cache_memory_bytes": 1 << 28}
    sizes |= {"max_num_seqs": 32, "max_num_batched_tokens": 2048}
    engine = start_small(model, **sizes, **rule, **KINDS[kind].arguments)
    engine.spoil()
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def references(kind, model, engine):
    """The references in fp32 and in bf16.

    vLLM's backend for models that it takes from `transformers` changes their classes, which then need its settings.
    They would compile themselves, which the reference's attention does not allow.
    """
    make, config = KINDS[kind].reference, copy(engine.worker.vllm_config)
    config.compilation_config = copy(config.compilation_config)
    config.compilation_config.mode = CompilationMode.NONE
    with set_current_vllm_config(config):
        return [make(model, dtype=dtype, device="cuda") for dtype in (torch.float32, torch.bfloat16)]


def test_decoding_runs_in_graphs(kind, engine):
    assert engine.worker.vllm_config.compilation_config.cudagraph_mode == KINDS[kind].graphs


def test_answers(kind, engine, references, text_ids):
    """All cases in one batch, twice: the second time with the prefix cache of the first."""
    cases = cases_of(text_ids, KINDS[kind].lengths, RULES)
    asked = {"full_layers": KINDS[kind].full_layers, "intervals": INTERVALS, "num_tokens": 16}
    for _ in range(2):
        print(f"{kind}: {check_rules(engine, references, cases, **asked)}")
    engine.step()  # so that the worker forgets finished requests
    assert engine.worker.num_evicted() == {}
