"""An fp8 (e4m3) KV cache on a GPU: half the bytes, and compaction on top."""

import pytest
import torch
from agreement import agreement, steps_of
from engine import keep

pytestmark = pytest.mark.gpu

NUM_TOKENS = 16


def test_a_block_holds_twice_the_tokens(on_gpu_fp8, on_gpu):
    bytes_of = {
        engine: engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_tensors[0].size
        / engine.pool.num_gpu_blocks
        / engine.managers[1].block_size
        for engine in (on_gpu_fp8, on_gpu)
    }
    assert bytes_of[on_gpu_fp8] == pytest.approx(bytes_of[on_gpu] / 2, rel=0.02)


def test_compressed_requests_beside_each_other_and_alone(on_gpu_fp8, exact, text_ids):
    """fp8 moves logits further than bf16; how far is read off the uncompressed answer."""
    prompt = text_ids[100:1100]
    asks = {ratio: keep(ratio, num_tokens=NUM_TOKENS, logprobs=20) for ratio in ("1.0", "0.9", "0.5")}
    together = [steps_of(output) for output in on_gpu_fp8.generate([prompt] * 3, list(asks.values()))]
    drift = {}
    for (ratio, params), steps in zip(asks.items(), together, strict=True):
        (alone,) = on_gpu_fp8.generate([prompt], [params])
        logits = exact.logits(prompt, [step.token for step in steps], ratio)
        drift[ratio] = max(
            abs(logits[i, token].item() - logit) for i, step in enumerate(steps) for token, logit in step.logits.items()
        )
        found = agreement(steps_of(alone), steps)
        print(ratio, found, drift[ratio])
        assert max(found.drift, found.gap) <= drift["1.0"]
    # Half of the keys tie or swap places at the edge of what is kept, which moves logits a little more.
    assert drift["0.9"] <= 2 * drift["1.0"]
    assert drift["0.5"] <= 2 * drift["1.0"]
    wrong = exact.logits(prompt, [step.token for step in together[2]], "1")
    right = exact.logits(prompt, [step.token for step in together[2]], "0.5")
    assert (right - wrong).abs().gather(1, right.topk(20).indices).max() > 2 * drift["1.0"]
    assert torch.isfinite(right).all()
