"""Compaction of an fp8 (e4m3) KV cache on a GPU, which has half the bytes."""

import pytest
from agreement import agreement, likely_differences, rms, steps_of, tokens_of
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


@pytest.mark.parametrize("ratio", ["1.0", "0.9", "0.5"])
def test_answers_equal_the_reference_as_far_as_fp8_allows(on_gpu_fp8, exact, rounded_to_fp8, text_ids, ratio):
    """fp8 keeps four bits of a number; how much that changes logits is measured on the reference, as for bf16."""
    moved, reach, wrong = [], [], []
    for begin in (14, 28, 100):
        prompt = text_ids[begin : begin + 1000]
        (output,) = on_gpu_fp8.generate([prompt], [keep(ratio, num_tokens=NUM_TOKENS, logprobs=20)])
        steps = steps_of(output)
        right, fp8, other = (
            reference.logits(prompt, tokens_of(steps), other_ratio)
            for reference, other_ratio in ((exact, ratio), (rounded_to_fp8, ratio), (exact, "0.1"))
        )
        likely = right.topk(20).indices
        moved += likely_differences(steps, right)
        reach += (right - fp8).gather(1, likely).flatten().tolist()
        wrong += (right - other).gather(1, likely).flatten().tolist()
    print(f"keep {ratio}: logits differ by {rms(moved):.3f}, fp8 moves them by {rms(reach):.3f}")
    assert rms(moved) <= 2 * rms(reach)
    assert rms(wrong) > 2 * rms(reach)


def test_compressed_requests_in_a_batch_equal_those_alone(on_gpu_fp8, text_ids):
    prompt = text_ids[100:1100]
    params = [keep(ratio, num_tokens=NUM_TOKENS, logprobs=20) for ratio in ("1.0", "0.9", "0.5")]
    together = on_gpu_fp8.generate([prompt] * 3, params)
    uncompressed, *compressed = (
        agreement(steps_of(on_gpu_fp8.generate([prompt], [one])[0]), steps_of(output))
        for one, output in zip(params, together, strict=True)
    )
    print([(found.num_equal, found.steps, rms(found.differences)) for found in (uncompressed, *compressed)])
    for found in compressed:
        assert found.steps <= 8  # fp8 has an eighth of bf16's precision
        assert rms(found.differences) <= 2 * max(rms(uncompressed.differences), 0.25)
