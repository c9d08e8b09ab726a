"""Scorers against loops that a reader can check by eye, and against kvpress where it has the scorer."""

import importlib
import importlib.util
import math
import struct
import sys
from types import ModuleType

import pytest
import torch
from weights import made_up_weights, write_profile

from vllm_l2kv import engine_args
from vllm_l2kv.kernels.reference import select
from vllm_l2kv.params import SCORERS
from vllm_l2kv.profile import Profile, Rope
from vllm_l2kv.scorers import Heads, Rows, Scorers, bind, bytes_of_a_head
from vllm_l2kv.scorers.learned import features, weights_of

NUM_LAYERS, NUM_HEADS, HEAD_SIZE = 32, 3, 8


def bound(layers=(0,), num_heads: int = NUM_HEADS, rank: int = 0, degree: int = 1) -> Scorers:
    heads = Heads.of_rank(layers, num_heads, rank, degree, torch.device("cpu"))
    return bind(heads, made_up_weights(NUM_LAYERS, num_heads, HEAD_SIZE))


def rows_of(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32, num_heads: int = NUM_HEADS) -> Rows:
    """Returns keys around a common direction, like real ones."""
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


def keydiff_value(keys, values):
    def level(measure):
        (cut,) = struct.unpack(">f", struct.pack(">f", measure)[:2] + bytes(2))
        return cut

    def ranks(measures):
        assert all(level(m - 1e-6) == level(m + 1e-6) for m in measures), "rounding decides of a level"
        order = sorted(range(len(measures)), key=lambda i: (level(measures[i]), -i))
        return {i: rank for rank, i in enumerate(order)}

    unlike, large = ranks(keydiff(keys, values)), ranks([norm(value) for value in values])
    return [unlike[i] + large[i] for i in range(len(keys))]


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
    "keydiff_value": keydiff_value,
    "l2_pagerank": l2_pagerank,
    "lagkv": lagkv,
}


def test_every_scorer_is_checked():
    """The scorers `random` and `learned` have tests of their own."""
    assert {*LOOPS, "random", "learned"} == {*SCORERS}


@pytest.mark.parametrize("name", LOOPS)
def test_against_loops(name):
    rows = rows_of(4 + 3 * 128 + 20, seed=10)  # no value at the edge between two levels of `keydiff_value`
    scores = bound()[name].score(rows)
    assert scores.dtype == torch.float32
    for head in range(NUM_HEADS):
        expected = LOOPS[name](rows.keys[head].tolist(), rows.values[head].tolist())
        assert torch.allclose(scores[head], torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-6)


def test_random_scores_are_uniform_and_independent():
    """Independent between heads, between layers, and between rows of a head."""
    chance, rows = bound((0, 31))["random"], torch.zeros(2, 20_000, 1)
    scores = torch.cat([chance.score(Rows(rows, rows, layer)) for layer in range(2)])
    assert torch.equal(scores[2:], bound((31,))["random"].score(Rows(rows, rows)))
    assert ((scores >= 0) & (scores < 1)).all()
    assert torch.histc(scores, 10, 0, 1).sub(8000).abs().max() < 400
    assert (torch.corrcoef(scores) - torch.eye(4)).abs().max() < 0.03
    assert abs(torch.corrcoef(torch.stack([scores[0, 1:], scores[0, :-1]]))[0, 1]) < 0.03


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rotary_dim", "slow_pairs"), [(0, 0), (4, 0), (4, 2), (8, 0), (8, 1), (8, 3)])
def test_learned_scores_against_loops(rotary_dim, slow_pairs, interleaved):
    """In layer 8 of the model, heads 2 and 3, which belong to the second of three ranks."""
    weights = made_up_weights(10, 6, HEAD_SIZE, Rope(rotary_dim, interleaved, slow_pairs))
    scorer = bind(Heads.of_rank((3, 8), 6, 1, 3, torch.device("cpu")), weights)["learned"]
    rows = rows_of(40, dtype=torch.bfloat16, num_heads=2)._replace(layer=1)
    scores = scorer.score(rows)
    assert scores.dtype == torch.float32
    for head in range(2):
        w1, b1, w2, wl, b = (weights.tensors[name][8, 2 + head].tolist() for name in ("w1", "b1", "w2", "wl", "b"))
        for row in range(40):
            key, value = rows.keys[head, row].tolist(), rows.values[head, row].tolist()
            half = rotary_dim // 2
            pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
            slow = pairs[half - slow_pairs :]
            x = [math.hypot(key[i], key[j]) for i, j in pairs]
            x += [*(key[i] for i, _ in slow), *(key[j] for _, j in slow), *key[rotary_dim:], *value]
            x = torch.tensor([*x, math.log(norm(key)), math.log(norm(value))]).bfloat16().tolist()
            expected = b + sum(w * x_i for w, x_i in zip(wl, x, strict=True))
            for unit in range(64):
                z = b1[unit] + sum(x_i * w[unit] for x_i, w in zip(x, w1, strict=True))
                gelu = z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
                expected += w2[unit] * gelu
            assert scores[head, row] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_learned_scores_depend_on_the_position_only_in_slow_pairs():
    """A key rotated to another position has the same features, except for their elements."""
    angles = torch.linspace(0.1, 3, HEAD_SIZE // 2)
    keys, values = rows_of(50)[:2]
    first, second = keys.chunk(2, dim=-1)
    turned = [first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()]
    for slow_pairs, seen in ((0, []), (1, [4, 5]), (2, [4, 5, 6, 7])):
        rope = Rope(HEAD_SIZE, interleaved=False, slow_pairs=slow_pairs)
        before, after = (features(each, values, rope) for each in (keys, torch.cat(turned, -1)))
        assert [i for i, d in enumerate((before - after).abs().amax((0, 1))) if d > 1e-5] == seen


def test_the_learned_scorer_takes_its_declared_memory():
    weights = made_up_weights(NUM_LAYERS, 6, HEAD_SIZE)
    scorer = bind(Heads.of_rank(range(2, 9), 6, 1, 2, torch.device("cpu")), weights)["learned"]
    held = sum(
        tensor.untyped_storage().nbytes() for tensor in vars(scorer).values() if isinstance(tensor, torch.Tensor)
    )
    assert held == 7 * 3 * bytes_of_a_head(weights)


def test_a_profile_gives_its_weights(tmp_path):
    path, weights = tmp_path / "profile.safetensors", made_up_weights(2, 3, HEAD_SIZE, Rope(4, interleaved=True))
    write_profile(path, weights)
    read = weights_of(Profile.read(path))
    assert read.rope == weights.rope
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in weights.tensors.items())


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "wl", "b"])
def test_a_profile_with_other_weights_is_refused(tmp_path, name):
    """At the start, not at the first request."""
    weights = made_up_weights(2, 3, HEAD_SIZE)
    for number, changed in enumerate([{name: weights.tensors[name][:, :2]}, {}]):
        tensors = {other: tensor for other, tensor in weights.tensors.items() if other != name} | changed
        profile = write_profile(tmp_path / f"{number}.safetensors", weights, tensors=tensors)
        with pytest.raises(ValueError, match=rf"damaged: learned\.{name} is .*, not \(2, 3"):
            weights_of(profile)


def test_the_learned_scorer_needs_weights():
    assert set(SCORERS) - bind(Heads.of_rank((0,), 1, 0, 1, torch.device("cpu"))).keys() == {"learned"}


class TestAScorerOfAUser:
    def test_it_is_bound_like_another(self, own):
        own("class Recent(Scorer):\n    pass")
        heads = Heads.of_rank((3,), 2, 0, 1, torch.device("cpu"))
        bound = bind(heads, names=("l2", "own_scorers:Recent"))
        assert list(bound) == ["l2", "own_scorers:Recent"]
        assert bound["own_scorers:Recent"].heads is heads

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (None, "'own_scorers:Recent' cannot be imported .*; add the folder of its module to PYTHONPATH"),
            ("import nothing_of_this_name", r"cannot be imported \(No module named 'nothing_of_this_name'\)"),
            ("", "own_scorers must have a class Recent derived from vllm_l2kv.scorers.Scorer"),
            ("def Recent(heads): pass", "own_scorers must have a class Recent"),
            ("class Recent: pass", "own_scorers must have a class Recent"),
        ],
    )
    def test_a_class_that_is_no_scorer_is_refused_before_an_engine_starts(self, own, code, message):
        if code is not None:
            own(code)
        with pytest.raises(ValueError, match=message):
            engine_args(evaluation_scorers=["own_scorers:Recent"])

    @pytest.fixture
    def own(self, tmp_path, monkeypatch):
        """Writes the module of this name."""
        monkeypatch.syspath_prepend(tmp_path)
        yield lambda code: (tmp_path / "own_scorers.py").write_text(f"from vllm_l2kv.scorers import Scorer\n{code}\n")
        sys.modules.pop("own_scorers", None)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 40])
def test_equal_rows_rank_by_their_place(num_tokens):
    """The first row has rank n - 1 twice, the last row rank 0 twice."""
    rows = Rows(torch.ones(1, num_tokens, HEAD_SIZE), torch.ones(1, num_tokens, HEAD_SIZE))
    assert bound()["keydiff_value"].score(rows)[0].tolist() == [2 * i for i in reversed(range(num_tokens))]


def test_a_broken_value_ranks_lowest():
    rows = rows_of(40)
    rows.values[:, 7] = torch.nan
    bare = rows._replace(values=torch.ones_like(rows.values))
    of_values = bound()["keydiff_value"].score(rows) - bound()["keydiff_value"].score(bare)
    # If all values are equal, row 7 of 40 has rank 32.
    assert (of_values[:, 7] == 0 - 32).all()


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
    """Six heads divided between ranks, or each on two ranks; in the second layer of a group with an offset."""
    heads = rows_of(300, num_heads=6)
    whole = select(bound((4, 7), 6)[name].score(heads._replace(layer=1)), 100)
    for rank in range(degree):
        own = slice(rank * 6 // degree, rank * 6 // degree + max(6 // degree, 1))
        scorer = bound((7, 9), 6, rank, degree)[name]
        assert len(scorer.heads.of_layers[0]) == own.stop - own.start
        assert torch.equal(select(scorer.score(Rows(heads.keys[own], heads.values[own])), 100), whole[own])


@pytest.mark.parametrize("name", SCORERS)
def test_broken_numbers_break_nothing(name):
    """Keys and values that are zero, huge or NaN: any valid choice is right."""
    rows = rows_of(300)
    for i, value in enumerate((0.0, 1e30, float("inf"), float("nan"))):
        rows.keys[:, 20 * i : 20 * i + 20] = value
        rows.values[:, 20 * i + 10 : 20 * i + 30] = value
    kept = select(bound()[name].score(rows), 100, 3, 5)
    assert all(len(set(row)) == 100 and {0, 1, 2, *range(295, 300)} <= set(row) for row in kept.tolist())


@pytest.fixture(scope="module")
def press():
    """Classes of kvpress. The whole package cannot be imported, since it needs other versions than vLLM."""
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
    # Ranks of partitions tie, and kvpress breaks ties at random: here both use this project's rule.
    for num_keep in (num_tokens // 10, num_tokens // 2, num_tokens - 7):
        assert torch.equal(select(ours, num_keep), select(theirs.float(), num_keep))


@pytest.mark.parametrize("num_tokens", [100, 700])
def test_the_control_of_first_and_last_equals_kvpress(press, num_tokens):
    streaming = press("streaming_llm_press", "StreamingLLMPress")
    streaming.compression_ratio = 0.5
    rows = rows_of(num_tokens)
    theirs = streaming.score(None, None, rows.keys[None], rows.values[None], None, {})[0]
    assert torch.equal(select(bound()["first_last"].score(rows), num_tokens // 2), select(theirs, num_tokens // 2))
