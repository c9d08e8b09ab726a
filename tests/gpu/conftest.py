"""Engines on a GPU as users run them: bf16, CUDA graphs, async scheduling, prefix caching."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "speed"))

if torch.cuda.is_available():
    # By default vLLM forks the ranks of an engine, which fails once this process has used the GPU for another engine.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

LOGITS = {"logprobs_mode": "raw_logits", "max_logprobs": 20}


def start_on_gpu(demo_model, rule=MappingProxyType({}), **arguments):
    """Starts engines with short intervals, so that a budget causes several compactions in a prompt and in an answer."""
    from engine import Engine, bare_rule

    defaults = {
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.5,
        "seed": 0,
        **LOGITS,
        **bare_rule(**{"full_layers": (0, 1), "prompt_interval": 300, "answer_interval": 5, **rule}),
    }
    return Engine(demo_model, **{**defaults, **arguments})


@pytest.fixture(scope="session")
def weights(demo_model):
    """Made-up weights of the scorer `learned`."""
    from transformers import AutoConfig
    from weights import made_up_weights

    config = AutoConfig.from_pretrained(demo_model)
    return made_up_weights(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)


@pytest.fixture(scope="session")
def on_gpu(demo_model, weights, tmp_path_factory):
    """An engine with a profile, so that requests may name every scorer that servers offer."""
    from weights import write_profile

    from vllm_l2kv.profile import fingerprint

    profile = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    write_profile(profile, weights, fingerprint(demo_model))
    engine = start_on_gpu(demo_model, {"profile": profile, "default_keep_ratio": 1.0})
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def on_gpu_fp8(demo_model):
    """Started on demand; without graphs, which another engine covers."""
    engine = start_on_gpu(demo_model, kv_cache_dtype="fp8_e4m3", enforce_eager=True, gpu_memory_utilization=0.2)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def sleepy(demo_model):
    """Started on demand, with graphs, in memory that vLLM releases while it sleeps."""
    engine = start_on_gpu(demo_model, enable_sleep_mode=True, max_num_seqs=4, gpu_memory_utilization=0.15)
    yield engine
    engine.shutdown()


FULL_HEADS = MappingProxyType(
    {1: (0,), 4: (0, 2), 6: (1,), 9: (1,), 12: (2,), 15: (0, 1, 2), 20: (1, 2), 22: (0,), 26: (0, 2), 29: (2,)}
)
"""15 of 90 heads, which waste nothing: contiguous ones and others, and one layer with full heads only."""


@pytest.fixture(scope="session")
def full_heads():
    return FULL_HEADS


@pytest.fixture(scope="session")
def heads_in_graphs(demo_model):
    arguments = {"kv_cache_memory_bytes": 4 << 30, "gpu_memory_utilization": 0.2}
    engine = start_on_gpu(demo_model, {"full_layers": (), "full_heads": FULL_HEADS}, **arguments)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def heads_in_fp8(demo_model):
    """An engine without graphs."""
    arguments = {"kv_cache_memory_bytes": 4 << 30, "gpu_memory_utilization": 0.15}
    arguments |= {"kv_cache_dtype": "fp8_e4m3", "enforce_eager": True}
    engine = start_on_gpu(demo_model, {"full_layers": (), "full_heads": FULL_HEADS}, **arguments)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def tight(demo_model):
    """Started on demand, without graphs: a default budget, and a context far longer than the cache."""
    engine = start_on_gpu(
        demo_model,
        {"default_max_tokens": 256},
        kv_cache_memory_bytes=24 << 20,
        enforce_eager=True,
        max_num_seqs=4,
        gpu_memory_utilization=0.1,
    )
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def exact(demo_model):
    """The reference in fp32."""
    from reference import Reference

    return Reference(demo_model, torch.float32, "cuda")


@pytest.fixture(scope="session")
def rounded(demo_model):
    """The reference in bf16, which shows how much bf16 alone changes logits."""
    from reference import Reference

    return Reference(demo_model, torch.bfloat16, "cuda")


@pytest.fixture(scope="session")
def learned(demo_model, weights):
    """The references with the scorer `learned`: in fp32, and in bf16."""
    from scored import ScoredReference

    references = [
        ScoredReference(demo_model, 2, weights, dtype=dtype, device="cuda") for dtype in (torch.float32, torch.bfloat16)
    ]
    for reference in references:
        reference.scorer = "learned"
    return references


@pytest.fixture(scope="session")
def rounded_to_fp8(demo_model):
    """The reference in bf16 with a cache in fp8."""
    from reference import Reference

    return Reference(demo_model, torch.bfloat16, "cuda", torch.float8_e4m3fn)


@pytest.fixture(scope="session")
def start_small(request) -> Callable[..., Any]:
    """Starts a small engine on the GPUs, of vllm-l2kv or of stock vLLM.

    It does not check free memory, so several processes may start engines at once.
    """
    from engine import Engine

    defaults = {
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 256,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 2 << 30,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]},
        "seed": 0,
        **LOGITS,
        **request.config.getoption("--gpu-engine-args"),
    }

    def start(model: Path, **arguments: Any) -> Engine:
        engine = Engine(model, **{**defaults, **arguments})
        # When it is deleted, it must not destroy the process groups of other engines in this process.
        engine.llm.llm_engine.engine_core._finalizer.detach()
        return engine

    return start


@pytest.fixture(scope="session")
def widened_model(demo_model, tmp_path_factory) -> Path:
    """The demo model with a fourth KV head, which does not change its answers."""
    from widened import widened

    return widened(tmp_path_factory.mktemp("widened"), demo_model)


@pytest.fixture(scope="session")
def replicated_model(tiny_model) -> Path:
    """Four query heads on one KV head."""
    return tiny_model("llama", num_key_value_heads=1, head_dim=64, dtype="bfloat16")


@pytest.fixture(scope="session")
def note(request) -> Callable[..., None]:
    """Prints a row of a test's findings, and adds it to the folder of `--rows`."""
    import vllm
    from rows import append, where

    folder = request.config.getoption("--rows")

    def add(**found: Any) -> None:
        row = {**where(), "num_gpus": 2, "vllm": vllm.__version__, **found}
        if folder is None:
            print(row)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            append(folder / "tp2_checks.jsonl", row)

    return add
