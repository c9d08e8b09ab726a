"""Drafts on a GPU: bf16, CUDA graphs, async scheduling where vLLM has it for the method.

The demo model drafts for itself, on its whole cache. EAGLE and EAGLE-3 heads have random weights, so that most of their
drafts are rejected. A tiny model with random weights has a prediction layer (`mtp`). Judged as in `test_engine`: by
what bf16 moves in the reference.
"""

from collections import Counter

import pytest
import tiny
import torch
from agreement import check_rules
from engine import bare_rule
from ranks import MixedLoad
from reference import Reference
from transformers import AutoConfig
from vllm.config import CUDAGraphMode

from vllm_l2kv import refusals

pytestmark = pytest.mark.gpu

METHODS = refusals.DRAFTERS["GPUs"]
INTERVALS = (300, 20)
RULES = {
    **{f"keep {ratio}": {"ratio": ratio} for ratio in ("1.0", "0.5", "0.25")},
    "budget 200": {"ratio": "1", "budget": 200, "first": 4, "last": 64},
    "document 300": {"ratio": "0.3", "document": 300},
}
LENGTHS = (33, 449, 1000, 1700)
NUM_TOKENS = 48


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def target(method, demo_model, tiny_model, tmp_path_factory):
    if method != "mtp":
        return demo_model
    small = tiny_model("qwen2", hidden_size=128, num_hidden_layers=6, initializer_range=0.06)
    return tiny.write_mtp(tmp_path_factory.mktemp("mtp"), small)


@pytest.fixture(scope="module")
def references(method, target, request):
    """The references in fp32 and in bf16."""
    if method != "mtp":
        return [request.getfixturevalue(name) for name in ("exact", "rounded")]
    return [Reference(target, dtype, "cuda") for dtype in (torch.float32, torch.bfloat16)]


@pytest.fixture(scope="module")
def drafting(method, demo_model, target, start_small, tmp_path_factory):
    speculative = {"method": method, "num_speculative_tokens": 3}
    if "ngram" in method:
        speculative |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    elif method == "draft_model":
        speculative["model"] = str(demo_model)
    elif method != "mtp":
        write = {"eagle": tiny.write_eagle, "eagle3": tiny.write_eagle3}[method]
        speculative["model"] = str(write(tmp_path_factory.mktemp(method), AutoConfig.from_pretrained(demo_model)))
    rule = bare_rule(full_layers=(0, 1), prompt_interval=INTERVALS[0], answer_interval=INTERVALS[1])
    sizes = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128]}}
    engine = start_small(target, max_num_seqs=32, speculative_config=speculative, **sizes, **rule)
    yield engine
    engine.shutdown()


@pytest.fixture
def counted(drafting, monkeypatch) -> Counter:
    """Counts draft tokens scheduled and accepted from now on."""
    counts: Counter = Counter()
    update = drafting.scheduler.update_from_output

    def count(scheduler_output, model_output):
        drafted = scheduler_output.scheduled_spec_decode_tokens
        counts["drafts"] += sum(map(len, drafted.values()))
        sampled = zip(model_output.req_ids, model_output.sampled_token_ids, strict=True)
        counts["accepted"] += sum(len(tokens) - 1 for req_id, tokens in sampled if req_id in drafted and tokens)
        return update(scheduler_output, model_output)

    monkeypatch.setattr(drafting.scheduler, "update_from_output", count)
    return counts


def test_it_runs_as_vllm_would_run_it(method, drafting):
    config = drafting.llm.llm_engine.vllm_config
    assert config.use_v2_model_runner
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
    assert config.scheduler_config.async_scheduling is (method != "ngram")


def test_layers_that_draft_are_full(method, drafting):
    full, compressed = (
        {name for group in drafting.worker.kv_cache_groups() if group["compressed"] is kind for name in group["layers"]}
        for kind in (False, True)
    )
    assert len(compressed) == (4 if method == "mtp" else 28)
    assert len(full) == 2 + {"draft_model": 30, "eagle": 1, "eagle3": 1, "mtp": 1}.get(method, 0)


@pytest.mark.parametrize("name", RULES)
def test_answers(name, method, drafting, counted, references, text_ids):
    """All lengths in one batch, twice: the second time with the prefix cache of the first."""
    rule = RULES[name]
    prompts = [text_ids[9 * i : 9 * i + n] for i, n in enumerate(LENGTHS) if n > rule.get("document", 0)]
    asked = {"full_layers": (0, 1), "intervals": INTERVALS, "num_tokens": NUM_TOKENS}
    for _ in range(2):
        found = check_rules(drafting, references, [(prompt, rule) for prompt in prompts], **asked)
        print(f"{method}, {name}: {found}")
    acceptance = counted["accepted"] / counted["drafts"]
    print(f"{method}, {name}: {counted['drafts']} drafts, {acceptance:.0%} accepted")
    assert counted["drafts"] > 100
    if method == "draft_model":
        assert acceptance > (0.8 if name == "keep 1.0" else 0.1)


def test_200_requests_of_mixed_rules_with_aborts(drafting, text_ids):
    load = MixedLoad(text_ids, [*RULES.values(), RULES["document 300"]], max_prompt=1800, num_tokens=48)
    load.run(drafting)
    print(load.looks)
    assert load.looks["times"] > 20, load.looks
    assert load.looks["compacted"] > 20, load.looks
    assert load.looks["aborted"] > 10, load.looks
    drafting.check_whole()
