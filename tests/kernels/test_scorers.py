"""Scorers against loops that a reader can check by eye, and against kvpress where it has them."""

import importlib
import importlib.util
import math
import sys
from types import ModuleType

import pytest
import torch

from vllm_l2kv.kernels.reference import select
from vllm_l2kv.params import SCORERS
from vllm_l2kv.scorers import Heads, Rows, Scorers, bind

NUM_HEADS, HEAD_SIZE = 3, 8


def bound(layers=(0,), num_heads: int = NUM_HEADS, rank: int = 0, degree: int = 1) -> Scorers:
    return bind(Heads.of_rank(layers, num_heads, rank, degree, torch.device("cpu")))


def rows_of(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32, num_heads: int = NUM_HEADS) -> Rows:
    """Keys around a common direction, as real ones lie."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(num_heads, num_tokens, HEAD_SIZE, generator=generator) for _ in range(2))
    return Rows((keys + 1).to(dtype), values.to(dtype))


def norm(vector) -> float:
    return math.sqrt(sum(x * x for x in vector))


def cosine(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (norm(a) * norm(b))


def keydiff(keys, values):
    mean = [sum(k[c] / norm(k) for k in keys) / len(keys) for c in range(len(keys[0]))]
    return [-cosine(key, mean) for key in keys]


def l2_pagerank(keys, values):
    weights = [math.exp(-norm(key)) for key in keys]
    start = [weight / sum(weights) for weight in weights]
    walkers = start
    for _ in range(3):
        arrived = [sum((1 + cosine(a, b)) / 2 * w for b, w in zip(keys, walkers, strict=True)) for a in keys]
        walkers = [0.15 * a / sum(arrived) + 0.85 * s for a, s in zip(arrived, start, strict=True)]
    return walkers


def lagkv(keys, values):
    def spread(rows, begin):
        following = rows[begin + 128 : begin + 256]
        lows, highs = [min(c) for c in zip(*following, strict=True)], [max(c) for c in zip(*following, strict=True)]
        spreads = []
        for row in rows[begin : begin + 128]:
            scaled = [(x - low) / (high - low) for x, low, high in zip(row, lows, highs, strict=True)]
            mean = sum(scaled) / len(scaled)
            spreads.append(math.sqrt(sum((x - mean) ** 2 for x in scaled) / (len(scaled) - 1)))
        total = sum(map(math.exp, spreads))
        return [math.exp(s) / total for s in spreads]

    scores = [1.0] * len(keys)
    for begin in range(4, 4 + 128 * ((len(keys) - 4) // 128 - 1), 128):
        both = [k + v for k, v in zip(spread(keys, begin), spread(values, begin), strict=True)]
        for rank, i in enumerate(sorted(range(128), key=both.__getitem__)):
            scores[begin + i] = rank / 128
    return scores


LOOPS = {
    "l2": lambda keys, values: [-norm(key) for key in keys],
    "l1": lambda keys, values: [-sum(map(abs, key)) for key in keys],
    "linf": lambda keys, values: [-max(map(abs, key)) for key in keys],
    "l2_high": lambda keys, values: [norm(key) for key in keys],
    "value_key_ratio": lambda keys, values: [norm(v) / norm(k) for k, v in zip(keys, values, strict=True)],
    "first_last": lambda keys, values: [len(keys)] * 4 + list(range(4, len(keys))),
    "keydiff": keydiff,
    "l2_pagerank": l2_pagerank,
    "lagkv": lagkv,
}


def test_every_scorer_but_chance_is_checked():
    assert {*LOOPS, "random"} == {*SCORERS}


@pytest.mark.parametrize("name", LOOPS)
def test_against_loops(name):
    rows = rows_of(4 + 3 * 128 + 20)
    scores = bound()[name].score(rows)
    assert scores.dtype == torch.float32
    for head in range(NUM_HEADS):
        expected = LOOPS[name](rows.keys[head].tolist(), rows.values[head].tolist())
        assert torch.allclose(scores[head], torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-6)


def test_chance_is_even_and_independent():
    """Between heads, between layers, and between rows of a head."""
    chance, rows = bound((0, 31))["random"], torch.zeros(2, 20_000, 1)
    scores = torch.cat([chance.score(Rows(rows, rows, layer)) for layer in range(2)])
    assert torch.equal(scores[2:], bound((31,))["random"].score(Rows(rows, rows)))
    assert ((scores >= 0) & (scores < 1)).all()
    assert torch.histc(scores, 10, 0, 1).sub(8000).abs().max() < 400
    assert (torch.corrcoef(scores) - torch.eye(4)).abs().max() < 0.03
    assert abs(torch.corrcoef(torch.stack([scores[0, 1:], scores[0, :-1]]))[0, 1]) < 0.03


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 131, 132, 259, 260, 261])
def test_any_length_keeps_as_many_as_asked(name, num_tokens):
    scores = bound()[name].score(rows_of(num_tokens))
    assert scores.shape == (NUM_HEADS, num_tokens)
    assert not scores.isnan().any()
    num_keep = max(num_tokens // 2, 1)
    kept = select(scores, num_keep, protect_last=1)
    assert (kept[:, -1] == num_tokens - 1).all()
    assert all(len(set(row)) == num_keep for row in kept.tolist())


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_small_types_are_scored_in_fp32(name, dtype):
    small = rows_of(300, dtype=dtype)
    exact = Rows(small.keys.float(), small.values.float())
    assert torch.equal(bound()[name].score(small), bound()[name].score(exact))


@pytest.mark.parametrize("name", SCORERS)
def test_heads_are_scored_by_themselves(name):
    scorer, rows = bound((3, 8))[name], rows_of(300)._replace(layer=1)
    together = scorer.score(rows)
    for head in range(NUM_HEADS):
        own = slice(head, head + 1)
        alone = scorer.score(Rows(rows.keys[own], rows.values[own], 1, head))
        assert torch.allclose(alone, together[own], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("degree", [2, 3, 6, 12])
def test_ranks_keep_what_one_rank_keeps(name, degree):
    """Six heads in parts, or each of them on two ranks; in the second layer of a group that begins elsewhere."""
    heads = rows_of(300, num_heads=6)
    whole = select(bound((4, 7), 6)[name].score(heads._replace(layer=1)), 100)
    for rank in range(degree):
        own = slice(rank * 6 // degree, rank * 6 // degree + max(6 // degree, 1))
        scorer = bound((7, 9), 6, rank, degree)[name]
        assert scorer.heads.num_heads == own.stop - own.start
        assert torch.equal(select(scorer.score(Rows(heads.keys[own], heads.values[own])), 100), whole[own])


@pytest.mark.parametrize("name", SCORERS)
def test_broken_numbers_break_nothing(name):
    """Keys and values that are zero, huge or not numbers: any choice will do, as long as it is one."""
    rows = rows_of(300)
    for i, value in enumerate((0.0, 1e30, float("inf"), float("nan"))):
        rows.keys[:, 20 * i : 20 * i + 20] = value
        rows.values[:, 20 * i + 10 : 20 * i + 30] = value
    kept = select(bound()[name].score(rows), 100, 3, 5)
    assert all(len(set(row)) == 100 and {0, 1, 2, *range(295, 300)} <= set(row) for row in kept.tolist())


@pytest.fixture(scope="module")
def press():
    """Classes of kvpress, whose package cannot be imported whole: it wants other versions than vLLM."""
    spec = importlib.util.find_spec("kvpress")
    assert spec is not None, "kvpress is part of requirements/cpu.txt"
    package = ModuleType("kvpress")
    package.__path__ = list(spec.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kvpress", package)
        yield lambda module, name: getattr(importlib.import_module(f"kvpress.presses.{module}"), name)()


@pytest.mark.parametrize(
    ("name", "module", "cls"),
    [
        ("l2", "knorm_press", "KnormPress"),
        ("keydiff", "keydiff_press", "KeyDiffPress"),
        ("lagkv", "lagkv_press", "LagKVPress"),
    ],
)
@pytest.mark.parametrize("num_tokens", [100, 260, 700])
def test_kept_sets_equal_those_of_kvpress(press, name, module, cls, num_tokens):
    rows = rows_of(num_tokens, seed=num_tokens)
    theirs = press(module, cls).score(None, None, rows.keys[None], rows.values[None], None, {})[0]
    ours = bound()[name].score(rows)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    # Ranks of partitions tie, and kvpress leaves ties to chance: both choose by our rule.
    for num_keep in (num_tokens // 10, num_tokens // 2, num_tokens - 7):
        assert torch.equal(select(ours, num_keep), select(theirs.float(), num_keep))


@pytest.mark.parametrize("num_tokens", [100, 700])
def test_the_control_of_first_and_last_equals_kvpress(press, num_tokens):
    streaming = press("streaming_llm_press", "StreamingLLMPress")
    streaming.compression_ratio = 0.5
    rows = rows_of(num_tokens)
    theirs = streaming.score(None, None, rows.keys[None], rows.values[None], None, {})[0]
    assert torch.equal(select(bound()["first_last"].score(rows), num_tokens // 2), select(theirs, num_tokens // 2))
