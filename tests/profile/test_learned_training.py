"""Training of the scorer `learned` on made-up rows with a known answer."""

import pytest
import torch

from vllm_l2kv.profile import Rope
from vllm_l2kv.scorers import Heads, Rows, Weights
from vllm_l2kv.scorers.learned import Bound
from vllm_l2kv.tools.profile.learned import Examples, _folded, scores_of, train

NUM_LAYERS, NUM_HEADS, HEAD_SIZE, NUM_ROWS, NUM_TEXTS = 4, 2, 8, 400, 9
ROPE = Rope(6, False, slow_pairs=1)
FREQUENCIES = torch.tensor([1.0, 0.3, 0.002])
CONTEXT = 700
LAYERS = [1, 3]


def rotated(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns keys `[..., T, HEAD_SIZE]` with their first elements rotated."""
    angles = positions[:, None] * FREQUENCIES
    first, second = keys[..., :3], keys[..., 3:6]
    turned = first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()
    return torch.cat([*turned, keys[..., 6:]], -1)


@pytest.fixture(scope="module")
def texts():
    """Yields for each text and layer keys, values, and the attention of each head by a rule of its own."""
    chance = torch.Generator().manual_seed(0)
    made = []
    for _ in range(NUM_TEXTS):
        layers = []
        for layer in LAYERS:
            keys, values = (torch.randn(NUM_HEADS, NUM_ROWS, HEAD_SIZE, generator=chance) for _ in range(2))
            # In layer 1, head 0 attends to one element of values, head 1 to short keys; in layer 3 the other way round.
            rules = [values[:, :, 2], -keys.norm(dim=-1)]
            paid = [rules[(head + (layer == 3)) % 2][head] for head in range(NUM_HEADS)]
            keys = rotated(keys, torch.arange(NUM_ROWS))
            layers.append((keys, values, torch.stack(paid).exp()))
        made.append(layers)
    return made


def no_examples() -> Examples:
    return Examples(ROPE, FREQUENCIES[2:], CONTEXT)


@pytest.fixture(scope="module")
def examples(texts):
    examples = no_examples()
    for layers in texts:
        for layer, rows in zip(LAYERS, layers, strict=True):
            examples.add(layer, *rows)
    return examples


@pytest.fixture(scope="module")
def trained(examples):
    return train(examples, NUM_LAYERS)


def test_each_head_learns_its_own_rule(trained):
    for ratio, overlap in trained.overlap.items():
        assert overlap > 0.5 + ratio / 2, f"{ratio}: {overlap}"


def test_the_weights_are_those_that_the_scorer_serves(trained, texts):
    heads = Heads.of_rank(LAYERS, NUM_HEADS, 0, 1, torch.device("cpu"))
    scorer = Bound(heads, Weights(trained.weights, ROPE))
    agree = []
    for i, (keys, values, paid) in enumerate(texts[-1]):
        # The score of a row does not depend on its position.
        keys = rotated(keys, torch.full((NUM_ROWS,), 300.0))
        scores = scorer.score(Rows(keys, values, i))
        agree.append(torch.corrcoef(torch.stack([scores[0], paid[0].log()]))[0, 1])
        agree.append(torch.corrcoef(torch.stack([scores[1], paid[1].log()]))[0, 1])
    assert min(agree) > 0.9


def test_overlap_is_measured_with_what_is_served(trained, texts):
    heads = Heads.of_rank(LAYERS, NUM_HEADS, 0, 1, torch.device("cpu"))
    keys, values, paid = texts[0][0]
    unmoved = Examples(ROPE, torch.zeros(1), 0)
    unmoved.add(LAYERS[0], keys, values, paid)
    served = Bound(heads, Weights(trained.weights, ROPE)).score(Rows(keys, values, 0))
    own = {name: tensor[LAYERS[0]] for name, tensor in trained.weights.items()}
    torch.testing.assert_close(scores_of(unmoved.features[LAYERS[0]][0], own), served[:, 4:], atol=1e-4, rtol=1e-4)


def test_positions_are_not_learned():
    """If rows differ only by their position, on which attention depends, the choice is as good as random."""
    chance, examples = torch.Generator().manual_seed(2), no_examples()
    for _ in range(NUM_TEXTS):
        keys = 1 + 0.01 * torch.randn(1, NUM_ROWS, HEAD_SIZE, generator=chance)
        keys = rotated(keys, torch.arange(NUM_ROWS))
        examples.add(0, keys, torch.ones_like(keys), torch.arange(NUM_ROWS).expand(1, -1))
    assert train(examples, 1).overlap[0.5] < 0.6


def test_rows_are_at_any_position_of_the_context(examples, texts):
    """The position differs for each row and text, and is the same in all layers and heads."""
    found = []
    for i, layer in enumerate(LAYERS):
        for text, of_layers in zip(examples.features[layer], texts, strict=True):
            # The third pair of three, which comes after as many magnitudes.
            before = torch.atan2(of_layers[i][0][:, 4:, 5], of_layers[i][0][:, 4:, 2])
            after = torch.atan2(text[..., 4].float(), text[..., 3].float())
            turned = (after - before + torch.pi) % (2 * torch.pi) - torch.pi
            found.append(torch.arange(4, NUM_ROWS) + turned / FREQUENCIES[2])
    places = torch.stack(found).view(len(LAYERS), NUM_TEXTS, NUM_HEADS, -1)
    rounding = 3  # rounding of features to bf16, in positions
    assert (places - places[:1, :, :1]).abs().max() < 2 * rounding
    assert -rounding < places.min() < 10
    assert CONTEXT - 10 < places.max() < CONTEXT + rounding
    rows = places[0, :, 0]
    assert (rows.mean(0) - CONTEXT / 2).abs().mean() < CONTEXT / 8
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.2


def test_layers_without_rows_have_no_weights(trained):
    for name, tensor in trained.weights.items():
        assert tensor.shape[:2] == (NUM_LAYERS, NUM_HEADS), name
        assert not tensor[[0, 2]].any(), name
        assert tensor[LAYERS].any(), name


def test_training_is_the_same_every_time(examples):
    once, again = (train(examples, NUM_LAYERS, num_steps=5, batch=8).weights for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_one_text_is_too_few(texts):
    examples = no_examples()
    examples.add(0, *texts[0][0])
    with pytest.raises(ValueError, match="at least 2 texts, got 1"):
        train(examples, NUM_LAYERS)


def test_inputs_are_standardised_within_the_weights():
    chance = torch.Generator().manual_seed(1)
    shapes = (2, 5, 64), (2, 1, 64), (2, 64, 1), (2, 5, 1), (2, 1, 1)
    w1, b1, w2, wl, b = (torch.randn(shape, generator=chance) for shape in shapes)
    mean, deviation = torch.randn(2, 1, 5, generator=chance) * 3, torch.rand(2, 1, 5, generator=chance) + 0.5
    x = mean + deviation * torch.randn(2, 30, 5, generator=chance)
    inputs = (x - mean) / deviation
    expected = (torch.nn.functional.gelu(inputs @ w1 + b1, approximate="tanh") @ w2 + inputs @ wl + b)[..., 0]
    found = scores_of(x, _folded(w1, b1, w2, wl, b, mean, deviation))
    # Weights are rounded to bf16.
    torch.testing.assert_close(found, expected, atol=0.02 * expected.std().item(), rtol=0)
