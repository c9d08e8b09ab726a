"""Layers with KV heads of both classes on a GPU: decoding in one call, with graphs and without, in bf16 and fp8.

Compared as in `test_engine.py`, by how much bf16 or fp8 changes the reference.
"""

import pytest
import torch
from agreement import likely_differences, rms, steps_of, tokens_of
from engine import keep
from ranks import MixedLoad
from reference import Reference, check_numbers
from vllm.config import CUDAGraphMode

from vllm_l2kv.kv_cache_spec import full_name
from vllm_l2kv.worker.by_head import AttentionByHead
from vllm_l2kv.worker.heads import SplitAttention

pytestmark = pytest.mark.gpu

RULES = {
    **{f"keep {ratio}": {"ratio": ratio} for ratio in ("1.0", "0.5", "0.1")},
    "budget 200": {"ratio": "1", "budget": 200, "first": 4, "last": 64},
}
SHARED = [{"ratio": "0.25", "document": 700}, {"ratio": "1", "budget": 96, "first": 4, "last": 32}]
LENGTHS = (1, 33, 449, 1000, 2500)
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def references(demo_model, full_heads):
    """The references in fp32, in bf16, and in bf16 with a cache in fp8; then one in fp32 with other full heads."""
    kinds = (torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float8_e4m3fn)
    right = [Reference(demo_model, dtype, "cuda", cached, full_heads) for dtype, cached in kinds]
    others = {layer: tuple((head + 1) % 3 for head in heads) for layer, heads in full_heads.items()}
    return [*right, Reference(demo_model, torch.float32, "cuda", None, others)]


def by_head(engine):
    """Layers that decode in one call."""
    layers = {name: layer for name, layer in engine.layers.items() if full_name(name) in engine.layers}
    assert all(isinstance(layer.impl, AttentionByHead | SplitAttention) for layer in layers.values())
    return sorted(int(name.split(".")[2]) for name, layer in layers.items() if isinstance(layer.impl, AttentionByHead))


@pytest.mark.parametrize("kind", ["heads_in_graphs", "heads_in_fp8"])
def test_layers_with_both_classes_decode_in_one_call(request, kind, full_heads):
    engine = request.getfixturevalue(kind)
    assert by_head(engine) == [layer for layer, heads in full_heads.items() if len(heads) < 3]
    config = engine.llm.llm_engine.vllm_config.compilation_config
    assert (config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE) == (kind == "heads_in_graphs")


@pytest.mark.parametrize(("kind", "rounded"), [("heads_in_graphs", 1), ("heads_in_fp8", 2)])
def test_answers_equal_the_reference(request, kind, rounded, references, text_ids):
    """Every length and rule in one batch; its prefill takes a call for each run of adjacent heads."""
    engine, exact, other = request.getfixturevalue(kind), references[0], references[-1]
    intervals = engine.scheduler.settings.intervals
    cases = [(text_ids[7 * i : 7 * i + n], name) for i, n in enumerate(LENGTHS) for name in RULES]
    asked = [keep(**RULES[name], num_tokens=NUM_TOKENS, logprobs=20) for _, name in cases]
    outputs = engine.generate([prompt for prompt, _ in cases], asked)
    for name in RULES:
        moved, reach, compacted, apart = [], [], [], []
        for (prompt, of_rule), output in zip(cases, outputs, strict=True):
            if of_rule != name:
                continue
            numbers = check_numbers(output, intervals=intervals, **RULES[name])
            steps = steps_of(output)
            right, near, far = (
                reference.logits(prompt, tokens_of(steps), intervals=intervals, full_layers=(), **RULES[name])
                for reference in (exact, references[rounded], other)
            )
            likely = right.topk(20).indices
            moved += likely_differences(steps, right)
            reach += (right - near).gather(1, likely).flatten().tolist()
            if numbers["compactions"]:
                compacted += likely_differences(steps, right)
                apart += likely_differences(steps, far)
        found = f"{name}: logits differ by {rms(moved):.3f}, rounding moves them by {rms(reach):.3f}"
        if apart:
            found += f"; after compaction by {rms(compacted):.3f}, from those of other full heads by {rms(apart):.3f}"
        print(found)
        assert rms(moved) <= 2 * rms(reach), name
        assert name == "keep 1.0" or rms(apart) > 1.1 * rms(compacted), f"{name}: other heads would not be noticed"


def test_200_requests_of_mixed_rules_with_aborts(heads_in_graphs, text_ids):
    load = MixedLoad(text_ids, [*RULES.values(), *SHARED, *SHARED], max_prompt=1800, num_tokens=48)
    load.run(heads_in_graphs)
    print(load.looks)
    assert load.looks["times"] > 20, load.looks
    assert load.looks["compacted"] > 20, load.looks
    assert load.looks["aborted"] > 10, load.looks
    assert len(load.answers.keys() - set(load.aborted)) == load.num_requests - load.num_aborted
    assert all(len(answer) == 48 for name, answer in load.answers.items() if name not in load.aborted)
