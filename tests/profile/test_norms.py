"""Formulas against plain loops, and a tiny model against its own attention maps."""

import math
from pathlib import Path

import pytest
import torch

from vllm_l2kv.tools.profile.attention import (
    attention_loss,
    attention_loss_reference,
    evicted_attention,
    per_kv_head,
    rank_correlation,
    variation,
)
from vllm_l2kv.tools.profile.norms import FIRST, KEEP_RATIOS, LOW, NUM_PEAKS, NUM_QUERIES, measure
from vllm_l2kv.tools.profile.observe import Seen, read

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 96
TEXT = (ROOT / "examples" / "lighthouse.txt").read_text()


def looped_drops(norms: list[float], attention: list[float]) -> list[tuple[float, float]]:
    """`L^m` and `L^{m,ref}` for m = 1..n, as equations 1 and 2 are written."""
    n = len(norms)
    # Of equal norms the lower position is kept, so the higher one is evicted first.
    by_norm = sorted(range(n), key=lambda p: (-norms[p], -p))
    by_attention = sorted(range(n), key=lambda p: attention[p])
    return [
        (sum(attention[p] for p in by_norm[:m]), sum(attention[p] for p in by_attention[:m])) for m in range(1, n + 1)
    ]


def looped_alr(norms: torch.Tensor, attention: torch.Tensor) -> float:
    """Takes norms `[n]` and attention `[Q, n]` of one head."""
    areas = [sum(loss - ideal for loss, ideal in looped_drops(norms.tolist(), query.tolist())) for query in attention]
    return sum(areas) / len(areas)


def looped_loss(norms: torch.Tensor, attention: torch.Tensor, ratio: float) -> tuple[float, float]:
    n = len(norms)
    if (num_evicted := n - math.ceil(ratio * n - 1e-9)) == 0:
        return 0.0, 0.0
    drops = [looped_drops(norms.tolist(), query.tolist())[num_evicted - 1] for query in attention]
    total = attention.sum().item()
    return sum(loss for loss, _ in drops) / total, sum(ideal for _, ideal in drops) / total


def looped_ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def looped_correlation(x: list[float], y: list[float]) -> float:
    """Returns Pearson's correlation of ranks."""
    x, y, n = looped_ranks(x), looped_ranks(y), len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


@pytest.fixture
def norms() -> torch.Tensor:
    """Norms of two heads and 13 tokens, with a tie in the first head."""
    norms = torch.rand(2, 13, generator=torch.Generator().manual_seed(0)) + 0.5
    norms[0, 9] = norms[0, 4]
    return norms


@pytest.fixture
def attention() -> torch.Tensor:
    """Attention of three queries of each head; the sums are less than 1."""
    return 0.8 * torch.randn(2, 3, 13, generator=torch.Generator().manual_seed(1)).softmax(-1)


def test_evicted_attention_is_as_in_the_equations(norms, attention):
    by_norm, ideal = evicted_attention(norms, attention)
    for head in range(2):
        for query in range(3):
            expected = looped_drops(norms[head].tolist(), attention[head, query].tolist())
            assert list(zip(by_norm[head, query].tolist(), ideal[head, query].tolist(), strict=True)) == [
                pytest.approx(pair, abs=1e-6) for pair in expected
            ]


def test_alr_is_the_mean_over_queries(norms, attention):
    expected = [looped_alr(norms[head], attention[head]) for head in range(2)]
    assert attention_loss_reference(norms, attention).tolist() == pytest.approx(expected, abs=1e-5)


def test_alr_is_zero_only_where_norms_rank_as_attention_does(attention):
    one_query = attention[:, :1]
    assert attention_loss_reference(-one_query[:, 0], one_query).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert attention_loss_reference(one_query[:, 0], one_query).min() > 1


def test_losses_count_as_the_server_does(norms, attention):
    ratios = (1.0, 0.75, 0.5, 0.1, 0.01)
    losses, ideals = attention_loss(norms, attention, ratios)
    for row, ratio in enumerate(ratios):
        for head in range(2):
            expected = looped_loss(norms[head], attention[head], ratio)
            assert (losses[row, head].item(), ideals[row, head].item()) == pytest.approx(expected, abs=1e-6)


def test_a_head_that_looks_past_the_prompt_loses_nothing(norms):
    losses, ideals = attention_loss(norms, torch.zeros(2, 3, 13), [0.5])
    assert losses.tolist() == ideals.tolist() == [[0, 0]]


def test_rank_correlation_shares_ranks_of_ties(norms, attention):
    received = attention.sum(1)
    expected = [looped_correlation(norms[head].tolist(), received[head].tolist()) for head in range(2)]
    assert rank_correlation(norms, received).tolist() == pytest.approx(expected)
    assert rank_correlation(norms, norms.exp()).tolist() == pytest.approx([1, 1])
    assert rank_correlation(torch.ones(2, 13), received).tolist() == [0, 0]


def test_variation_is_std_over_mean():
    assert variation(torch.tensor([[1.0, 3.0], [5.0, 5.0]])).tolist() == [0.5, 0]


def test_a_kv_head_is_the_mean_of_neighbouring_query_heads():
    heads = torch.tensor([1.0, 3.0, 10.0, 20.0])[:, None, None].expand(4, 2, 5)
    assert per_kv_head(heads, 2)[:, 0, 0].tolist() == [2, 15]


def watched(folder: Path, token_ids: list[int]):
    """Returns keys and attention maps by `transformers` itself: `[layer][kv_heads, n, d]`, `[layer][heads, n, n]`."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        output = model(torch.tensor([token_ids]), past_key_values=DynamicCache(), output_attentions=True)
    return [layer.keys[0] for layer in output.past_key_values.layers], [maps[0] for maps in output.attentions]


def token_ids_of(tokenizer, num_chunks: int) -> list[list[int]]:
    token_ids, size = tokenizer(TEXT)["input_ids"], NUM_TOKENS - 1
    return [[tokenizer.bos_token_id, *token_ids[size * i : size * (i + 1)]] for i in range(num_chunks)]


def expected_measures(folder: Path, token_ids: list[int], layer: int, head: int) -> dict[str, float]:
    """Returns the measures of a model with two KV heads and four heads, from whole maps."""
    keys, maps = watched(folder, token_ids)
    n = NUM_TOKENS - NUM_QUERIES
    norms = torch.tensor([math.sqrt(sum(x * x for x in key)) for key in keys[layer][head, :n].tolist()])
    attention = (maps[layer][2 * head, n:, :n] + maps[layer][2 * head + 1, n:, :n]) / 2
    received = attention.sum(0)
    mean = norms.mean().item()
    ratios = range(len(KEEP_RATIOS))
    return {
        "variation": math.sqrt(sum((x - mean) ** 2 for x in norms.tolist()) / n) / mean,
        "correlation": looped_correlation((-norms).tolist(), received.tolist()),
        "alr": looped_alr(norms, attention) / n,
        "loss": [looped_loss(norms, attention, KEEP_RATIOS[i])[0] for i in ratios],
        "ideal_loss": [looped_loss(norms, attention, KEEP_RATIOS[i])[1] for i in ratios],
        "loss_beyond_first": [looped_loss(norms[1:], attention[:, 1:], KEEP_RATIOS[i])[0] for i in ratios],
        "sink": (received[0] / received.sum()).item(),
        "sink_rank": sum(x < norms[0].item() for x in norms.tolist()) / n,
    }


@pytest.fixture(scope="module")
def seen(llama, tokenizer) -> list[Seen]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    found: list[Seen] = []
    read(model, token_ids_of(tokenizer, 1)[0], found.append)
    return found


# Not layer 0: there a repeated token has the same norm up to rounding, and the order of the two is random.
@pytest.mark.parametrize(("layer", "head"), [(1, 0), (3, 1)])
def test_a_model_is_measured_as_by_hand(llama, tokenizer, seen, layer, head):
    found = measure(seen[layer])
    for name, expected in expected_measures(llama, token_ids_of(tokenizer, 1)[0], layer, head).items():
        assert found[name][..., head].tolist() == pytest.approx(expected, abs=1e-4), name


def made_up(keys: torch.Tensor, queries: torch.Tensor) -> Seen:
    """Returns one head with a token for each key; values do not matter."""
    return Seen(0, queries[None], keys[None], keys[None], 1.0, None, None)


LOW_KEYS = torch.tensor([[0, 0.1, 0, 0, 0, -1.0, 0.2, 0], [0, 0.3, 0, 0, 0, -0.4, -0.2, 0]])
FIRST_KEY = torch.tensor([0, 0.1, 0, 0, 0, -0.3, 0, 0])


@pytest.fixture
def peaked() -> Seen:
    """Two keys of low norm, in elements 1, 5 and 6; the others use all elements; queries attend to element 5."""
    generator = torch.Generator().manual_seed(0)
    n = 80
    keys = 3 * torch.randn(n, 8, generator=generator)
    low = torch.randperm(n - FIRST, generator=generator)[: round(LOW * n)] + FIRST
    keys[low] = LOW_KEYS[torch.arange(len(low)) % 2]
    keys[:FIRST] = FIRST_KEY
    tail = torch.randn(NUM_QUERIES, 8, generator=generator)
    queries = torch.zeros(n + NUM_QUERIES, 8)
    queries[:, 5] = -2.0
    return made_up(torch.cat((keys, tail)), queries)


def test_where_keys_of_low_norm_lie(peaked):
    """It is a mean of directions: the shorter of the two keys counts as much as the longer one."""
    found = {name: value[..., 0] for name, value in measure(peaked).items()}
    direction = sum(key / key.norm() for key in LOW_KEYS)
    direction /= direction.norm()
    assert found["low_query"] == pytest.approx(-direction[5].item(), abs=1e-5)
    assert found["low_first"] == pytest.approx((direction @ FIRST_KEY / FIRST_KEY.norm()).item(), abs=1e-5)
    assert found["all_query"] < found["low_query"]
    assert found["energy"].tolist() == pytest.approx(LOW_KEYS.square().mean(0).tolist(), abs=1e-6)
    assert found["energy"].topk(NUM_PEAKS).indices.sort().values.tolist() == [1, 5, 6]


def test_the_effect_of_zeroing_peaks(peaked):
    """Queries use only element 5: without it they attend to all tokens equally; other elements change nothing."""
    found = {name: value[..., 0] for name, value in measure(peaked).items()}
    keys, n = peaked.keys[0], len(peaked.keys[0]) - NUM_QUERIES
    moved = []
    for place in range(n, len(keys)):
        before = (-2 * keys[: place + 1, 5]).softmax(0)[:n]
        after = torch.full((n,), 1 / (place + 1))
        moved.append(((before - after).abs().sum() / 2).item())
    assert found["peaks_moved"] == pytest.approx(sum(moved) / len(moved), abs=1e-5)
    assert found["others_moved"] == pytest.approx(0, abs=1e-6)
    without = keys[:n].clone()
    without[:, [1, 5, 6]] = 0
    attention = torch.stack([(-2 * keys[: place + 1, 5]).softmax(0)[:n] for place in range(n, len(keys))])
    expected = looped_loss(without.norm(dim=-1), attention, 0.5)[0]
    assert found["loss_without_peaks"] == pytest.approx(expected, abs=1e-5)
