"""Masked rows against a cache from which they are evicted."""

from copy import deepcopy

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from vllm_l2kv.tools.profile.masked import Losses, answer_losses, read

NUM_CONTEXT, NUM_NEW, NUM_PREDICTED, NUM_KEPT = 70, 12, 5, 20


def test_the_cost_of_an_answer_counts_whether_it_is_exact_and_how_likely_it_is():
    lost = Losses(torch.tensor([0.0, 0.1, 1.0, 90.0]), torch.tensor([True, True, False, False]))
    assert lost.cost.tolist() == pytest.approx([0, (1 - 0.904837) / 2, 1 - 0.367879 / 2, 1], abs=1e-6)


@pytest.fixture(params=["llama", "qwen3", "gemma2", "gemma3", "lfm2", "nemotron_h"])
def model(request, tiny_model):
    folder = tiny_model(request.param)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def compacted(model, context, keep):
    """Returns a cache of the context with only the kept rows, in layers without a window, and states."""
    cache = DynamicCache(config=model.config) if context.states else DynamicCache()
    for layer, state in context.states.items():
        cache.layers[layer] = deepcopy(state)
    for layer, keys in context.keys.items():
        values = context.values[layer]
        if keys.shape[1] == context.num_tokens:
            rows = keep[layer].nonzero()[:, 1].view(len(keys), -1)
            keys, values = (torch.stack([each[h, rows[h]] for h in range(len(each))]) for each in (keys, values))
        cache.update(keys[None], values[None], layer)
    return cache


def expected(model, context, token_ids, keep):
    """Returns log probabilities `[NUM_PREDICTED, vocabulary]`, computed one token after the other."""
    cache, found = compacted(model, context, keep), []
    for i, token_id in enumerate(token_ids[:-1]):
        position = torch.tensor([[context.num_tokens + i]])
        logits = model(torch.tensor([[token_id]]), past_key_values=cache, position_ids=position).logits
        found.append(log_softmax(logits[0, -1], -1))
    return torch.stack(found[-NUM_PREDICTED:])


def attend(module, query, key, value, mask, scaling=None, softcap=None, sliding_window=None, **others):
    """Attention of one token to all rows in its cache, and in its window."""
    if sliding_window is not None:
        key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
    scores = query.unflatten(1, (key.shape[1], -1)) @ key[:, :, None].mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    attended = (scores.softmax(-1) @ value[:, :, None]).flatten(1, 2)
    return attended.transpose(1, 2).contiguous(), None


@torch.inference_mode()
def test_masking_is_evicting(model):
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 40_000, (NUM_CONTEXT + NUM_NEW,), generator=chance).tolist()
    context, after = read(model, ids[:NUM_CONTEXT]), ids[NUM_CONTEXT:]
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads, NUM_CONTEXT
    # Every head keeps different rows, and in the second choice layer 0 keeps everything.
    chosen = torch.rand(2, *shape, generator=chance).topk(NUM_KEPT, -1).indices
    keep = torch.zeros(2, *shape, dtype=torch.bool).scatter_(-1, chosen, True)
    keep[1, 0] = True
    found = answer_losses(model, context, after, NUM_PREDICTED, keep)
    assert model.config._attn_implementation == "eager"

    AttentionInterface.register("any_rows_of_one", attend)
    model.set_attn_implementation("any_rows_of_one")
    for choice in range(2):
        logits = expected(model, context, after, keep[choice])
        loss = -logits[range(NUM_PREDICTED), after[-NUM_PREDICTED:]].mean()
        assert found.loss[choice] == pytest.approx(loss.item(), abs=2e-4)
    assert abs(found.loss[0] - found.loss[1]) > 1e-2


@torch.inference_mode()
def test_an_answer_is_exact_if_greedy_decoding_says_it(model):
    context = read(model, list(range(100, 100 + NUM_CONTEXT)))
    size = model.config.num_hidden_layers, model.config.num_key_value_heads, NUM_CONTEXT
    keep = torch.ones(1, *size, dtype=torch.bool)
    keep[..., 8:50] = False
    said = [7, 7]
    AttentionInterface.register("any_rows_of_one", attend)
    model.set_attn_implementation("any_rows_of_one")
    for _ in range(3):
        said.append(int(expected(model, context, [*said, 0], keep[0])[-1].argmax()))
    assert answer_losses(model, context, said, 3, keep).exact.tolist() == [True]
    said[-2] += 1
    assert answer_losses(model, context, said, 3, keep).exact.tolist() == [False]


def test_what_cannot_be_predicted_is_refused(model):
    context = read(model, [5, 6, 7])
    with pytest.raises(ValueError, match=r"num_predicted must be in 1\.\.1, got 2"):
        answer_losses(model, context, [8, 9], 2, torch.ones(1, 1, 1, 3, dtype=torch.bool))
