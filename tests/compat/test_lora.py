"""An adapter changes keys, and so which rows are kept. The reference has the adapter merged in."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine import keep
from reference import Reference, check_numbers, expected_compactions
from rules import INTERVALS, RULES
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest

RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def adapter_and_merged(llama, tmp_path_factory) -> tuple[Path, Path]:
    """An adapter with random weights in PEFT's format, and the merged model."""
    adapter = tmp_path_factory.mktemp("adapter")
    merged = tmp_path_factory.mktemp("merged") / "model"
    shutil.copytree(llama, merged)
    weights = load_file(merged / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in [name for name in weights if name.split(".")[-2] in TARGETS]:
        out_features, in_features = weights[name].shape
        a = torch.randn(RANK, in_features, generator=generator) * 0.2
        b = torch.randn(out_features, RANK, generator=generator) * 0.2
        weights[name] += ALPHA / RANK * b @ a
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    return adapter, merged


@pytest.mark.parametrize(
    "full_heads", [None, pytest.param({1: (0,), 3: (1,)}, id="with full heads", marks=pytest.mark.slow)]
)
def test_adapted_and_plain_requests_in_one_batch(full_heads, llama, adapter_and_merged, run, text_ids):
    adapter, merged = adapter_and_merged
    request = LoRARequest("random", 1, str(adapter))
    references = {lora: Reference(model, full_heads=full_heads) for lora, model in ((request, merged), (None, llama))}
    rules = [{"ratio": "1"}, {"ratio": "0.5"}, *(rule.values[0] for rule in RULES)]
    cases = [(rule, lora) for rule in rules for lora in (request, None)]
    # In a batch with adapters, vLLM's CPU kernels use the last slot for a request without an adapter, also in stock
    # vLLM. So that slot stays empty.
    with run(llama, full_heads=full_heads, enable_lora=True, max_lora_rank=8, max_loras=2) as engine:
        # One prompt for all: the prefix cache must not mix rows of different adapters.
        prompt = text_ids[:300]
        asked = [{"prompt_token_ids": prompt}] * len(cases), [keep(**rule) for rule, _ in cases]
        adapters = [lora for _, lora in cases]
        outputs, again = (engine.llm.generate(*asked, lora_request=adapters, use_tqdm=False) for _ in range(2))
        engine.check_whole()
    for (rule, lora), output in zip(cases, outputs, strict=True):
        expected = references[lora].generate(prompt, 12, full_layers=(0,), intervals=INTERVALS, **rule)
        assert list(output.outputs[0].token_ids) == expected, rule
        numbers = check_numbers(output, intervals=INTERVALS, **rule)
        assert (numbers["compactions"] > 2) is ("budget" in rule)
        assert numbers.get("found_tokens", 0) == 0
    # Each request finds the rows of its own adapter.
    for (rule, _), before, output in zip(cases, outputs, again, strict=True):
        found = max(expected_compactions(300, 299, intervals=INTERVALS, **rule), default=0)
        assert check_numbers(output, intervals=INTERVALS, **rule).get("found_tokens", 0) == found
        assert output.outputs[0].token_ids == before.outputs[0].token_ids
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == len(cases)
