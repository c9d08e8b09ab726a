"""Watched layers against `transformers`' own attention maps."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from vllm_l2kv.tools.profile import observe

NUM_TOKENS = 80


@pytest.fixture(params=["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "glm", "glm4"])
def model(request, tiny_model):
    folder = tiny_model(request.param)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.inference_mode()
def test_what_is_seen_is_what_the_model_does(model, monkeypatch):
    monkeypatch.setattr(observe, "MAX_SCORES", 4 * 7 * NUM_TOKENS)  # seven queries at a time
    ids = torch.randint(10, 40_000, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = DynamicCache()  # without windows
    theirs = model.get_decoder()(torch.tensor([ids]), past_key_values=cache, output_attentions=True)
    seen: list[observe.Seen] = []
    observe.read(model, ids, seen.append)
    assert model.config._attn_implementation == "eager"
    assert [each.layer for each in seen] == list(range(len(theirs.attentions)))
    for each, attention, layer in zip(seen, theirs.attentions, cache.layers, strict=True):
        assert torch.allclose(each.keys, layer.keys[0], atol=1e-4)
        assert torch.allclose(each.values, layer.values[0], atol=1e-4)
        whole = torch.cat(list(each.attention(0)), 2)
        assert torch.allclose(whole.flatten(0, 1), attention[0], atol=1e-4)
        short = torch.cat(list(each.until(50).attention(45)), 2)
        assert torch.allclose(short.flatten(0, 1), attention[0, :, 45:50, :50], atol=1e-4)


def test_another_layout_is_refused(llama):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    model.config.num_hidden_layers += 1  # a layer that has not attended like the others
    with pytest.raises(ValueError, match="LlamaForCausalLM has attention of an unknown layout"):
        observe.read(model, [1, 2, 3], lambda seen: None)
