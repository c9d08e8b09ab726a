"""Engines on a GPU as users run them: bf16, CUDA graphs, async scheduling, prefix caching."""

import pytest
import torch

LOGITS = {"logprobs_mode": "raw_logits", "max_logprobs": 20}


def start_on_gpu(demo_model, **arguments):
    from engine import Engine, bare_rule

    defaults = {
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.5,
        "seed": 0,
        **LOGITS,
        **bare_rule(full_layers=(0, 1)),
    }
    return Engine(demo_model, **{**defaults, **arguments})


@pytest.fixture(scope="session")
def on_gpu(demo_model):
    engine = start_on_gpu(demo_model)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def on_gpu_fp8(demo_model):
    """Started when it is asked for; without graphs, which another engine proves."""
    engine = start_on_gpu(demo_model, kv_cache_dtype="fp8_e4m3", enforce_eager=True, gpu_memory_utilization=0.2)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def sleepy(demo_model):
    """Started when it is asked for, with graphs, in memory that vLLM gives back while it sleeps."""
    engine = start_on_gpu(demo_model, enable_sleep_mode=True, max_num_seqs=4, gpu_memory_utilization=0.15)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def exact(demo_model):
    """The reference in fp32."""
    from reference import Reference

    return Reference(demo_model, torch.float32, "cuda")


@pytest.fixture(scope="session")
def rounded(demo_model):
    """The reference in bf16: how far bf16 alone carries logits away."""
    from reference import Reference

    return Reference(demo_model, torch.bfloat16, "cuda")


@pytest.fixture(scope="session")
def rounded_to_fp8(demo_model):
    """The reference in bf16 with a cache in fp8."""
    from reference import Reference

    return Reference(demo_model, torch.bfloat16, "cuda", torch.float8_e4m3fn)
