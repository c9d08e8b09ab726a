"""Importance of layers and heads for answers, against plain loops and caches from which rows are evicted."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.tools.profile.calibration import Question
from vllm_l2kv.tools.profile.masked import read
from vllm_l2kv.tools.profile.model import layout
from vllm_l2kv.tools.profile.ranks import FLOOR, POOLED, answers, pooled_shares, repetition

NUM_TOKENS = 90
FIRST, LAST = CompressionParams.protect_first, CompressionParams.protect_last


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request, tiny_model):
    folder = tiny_model(request.param)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def drawn(num: int, seed: int = 0) -> list[int]:
    return torch.randint(10, 40_000, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


def maps(model, token_ids: list[int]) -> list[torch.Tensor]:
    """Attention maps `[heads, T, T]` of each layer."""
    with torch.inference_mode():
        return [each[0] for each in model(torch.tensor([token_ids]), output_attentions=True).attentions]


def test_a_repetition_scores_rows_by_the_most_attention(model):
    text, between = drawn(NUM_TOKENS), [5, 6, 7]
    whole = maps(model, [*text, *between, *text])
    shape, _ = layout(model)
    also: list[int] = []
    found = repetition(model, text, between, lambda seen: also.append(seen.keys.shape[1]))
    assert [rows.layer for rows in found] == list(shape.compressible)
    assert also == [NUM_TOKENS] * len(found)
    for rows in found:
        attention = whole[rows.layer].view(2, 2, *whole[0].shape[1:])[:, :, NUM_TOKENS + 3 :, :NUM_TOKENS]
        assert torch.allclose(rows.scores, attention.amax(dim=(1, 2)), atol=1e-5)
        assert rows.keys.shape == rows.values.shape == (2, NUM_TOKENS, 32)


def test_heads_share_a_budget():
    scores = torch.rand(3, 2, 50, generator=torch.Generator().manual_seed(0))
    scores[1, 0] += 1  # needs everything
    num_keep = math.ceil(POOLED * 50)
    kept = {(head // 2, head % 2): int(FLOOR * num_keep) for head in range(6)}
    left = num_keep * 6 - sum(kept.values())
    # The best rows of each head are fixed; the others compete.
    rest = [
        (score, (head // 2, head % 2))
        for head in range(6)
        for score in sorted(scores[head // 2, head % 2].tolist(), reverse=True)[int(FLOOR * num_keep) :]
    ]
    for _, head in sorted(rest, reverse=True)[:left]:
        kept[head] += 1
    shares = pooled_shares(scores)
    assert {head: round(shares[head].item() * 50) for head in kept} == kept
    assert shares.mean().item() == pytest.approx(num_keep / 50)
    assert shares[1, 0] == shares.max()


@pytest.fixture(scope="module")
def asked(model):
    """A question, its findings, and the loss of its answer with some rows evicted."""
    text, question = drawn(NUM_TOKENS), Question(drawn(6, 1), drawn(3, 2), (10, 14))
    shape, _ = layout(model)

    @torch.inference_mode()
    def loss(layer: int | None = None, head: int | None = None) -> float:
        """Returns the loss with keys of evicted rows changed so that no query attends to them."""
        cache = DynamicCache(config=model.config)
        model(torch.tensor([text]), past_key_values=cache)
        hidden = torch.zeros(1, 1, 1, dtype=torch.bool)
        if layer is not None:
            hidden = torch.zeros(2, NUM_TOKENS, dtype=torch.bool)
            hidden[slice(None) if head is None else head, FIRST : NUM_TOKENS - LAST] = True
        return _loss(model, cache, question, layer, hidden)

    return shape, answers(model, shape, read(model, text), question), text, question, loss


def _loss(model, cache, question, layer, hidden):
    """Returns the teacher-forced loss, with another attention function in one layer."""
    from vllm_l2kv.tools.profile.observe import attending

    def attend(module, query, key, value, mask, scaling=None, sliding_window=None, **others):
        n, num_rows = query.shape[2], key.shape[2]
        distance = torch.arange(num_rows - n, num_rows)[:, None] - torch.arange(num_rows)
        unseen = (distance < 0).expand(2, 1, n, num_rows).clone()
        if sliding_window is not None:
            unseen |= distance >= sliding_window
        if module.layer_idx == layer:
            unseen[..., :NUM_TOKENS] |= hidden[:, None, None]
        scores = query.view(2, -1, n, 32) @ key[0, :, None].transpose(-1, -2) * scaling
        attended = scores.masked_fill(unseen, -math.inf).softmax(-1) @ value[0, :, None]
        return attended.flatten(0, 1)[None].transpose(1, 2).contiguous(), None

    token_ids = [*question.question, *question.answer]
    with attending(model, attend):
        logits = model(torch.tensor([token_ids[:-1]]), past_key_values=cache).logits[0, -len(question.answer) :]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(question.answer)).item()


def test_retrieval_is_the_attention_of_the_answer_to_its_fact(model, asked):
    shape, found, text, question, _ = asked
    whole = maps(model, [*text, *question.question, *question.answer[:-1]])
    for layer in range(shape.num_layers):
        if layer not in shape.compressible:
            assert found.retrieval[layer].isnan().all()
            continue
        attention = whole[layer].view(2, 2, *whole[layer].shape[1:])[:, :, -3:, 10:14]
        assert torch.allclose(found.retrieval[layer], attention.sum(-1).amax(1).mean(-1), atol=1e-5)


def test_losses_are_those_of_rows_that_are_gone(asked):
    shape, found, _, _, loss = asked
    whole = loss()
    assert found.whole_loss == pytest.approx(whole, abs=1e-4)
    for layer in shape.compressible:
        assert found.loss[layer].item() == pytest.approx(loss(layer) - whole, abs=2e-4)
        for head in range(2):
            assert found.head_loss[layer, head].item() == pytest.approx(loss(layer, head) - whole, abs=2e-4)
    assert found.loss.nan_to_num().abs().max() > 0.01
    assert found.loss.isnan().tolist() == [layer not in shape.compressible for layer in range(shape.num_layers)]
