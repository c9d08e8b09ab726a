"""The GPU kernels against the torch reference; without a GPU in Triton's interpreter, on smaller sizes."""

import itertools
import os

import numpy as np
import pytest
import torch
from lives import Life, check_lives
from weights import made_up_weights

from vllm_l2kv.kernels.reference import LayerRows, compact_layer, read, select
from vllm_l2kv.messages.orders import CompactionOrder, GroupMove
from vllm_l2kv.params import OFFERED_SCORERS, SCORERS, CompressionParams
from vllm_l2kv.profile import Rope
from vllm_l2kv.scorers import Heads, Rows, bind, keydiff_value, norms
from vllm_l2kv.token_groups import pool_scores

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU here; test_interpreted.py runs these in Triton's interpreter", allow_module_level=True)

import triton.language as tl  # noqa: E402

from vllm_l2kv.kernels import finish, one_pass, ranks, scratch, select_and_move, slots, triton_compactor  # noqa: E402
from vllm_l2kv.kernels.batch import Batch  # noqa: E402
from vllm_l2kv.kernels.group_cache import GroupCache  # noqa: E402
from vllm_l2kv.kernels.scores import keydiff  # noqa: E402
from vllm_l2kv.kernels.scratch import Scratch  # noqa: E402
from vllm_l2kv.kernels.triton_compactor import TritonCompactor  # noqa: E402

# Rows after the last one, and NaN, divide by zero; only the interpreter warns of it.
pytestmark = (
    [pytest.mark.gpu] if ON_GPU else [pytest.mark.filterwarnings("ignore:(invalid|divide|overflow):RuntimeWarning")]
)
NUM_KV_HEADS = 2


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Makes programs few, since each takes the interpreter time; some then walk over several tiles."""
    if not ON_GPU:
        monkeypatch.setattr(one_pass, "ROWS", 64)
        monkeypatch.setattr(select_and_move, "MOVE_SPLIT", 3)


@pytest.fixture(autouse=True)
def rounded_bf16(monkeypatch):
    """The interpreter truncates to bf16 where GPUs round, and multiplies bits in place of bf16 matrices."""
    if ON_GPU:
        return
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data, from_type, to_type, mode):
        if (from_type, to_type) != (tl.float32, tl.bfloat16):
            return convert(data, from_type, to_type, mode)
        numbers = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return numbers.bfloat16().view(torch.int16).numpy().view(np.uint16)

    def widened_dot(self, a, b, *rest):
        of_type = interpreter.TensorHandle
        a, b = (of_type(convert(x.data, x.dtype, tl.float32, None).view(np.float32), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened_dot)


class Pool:
    """A pool in one of vLLM's layouts, filled with keys whose norms all differ in their type."""

    def __init__(
        self,
        num_blocks,
        block_size,
        num_layers=2,
        dtype=torch.bfloat16,
        head_size=64,
        layout="BLHNC",
        padding=0,
        rope=None,
    ):
        generator = torch.Generator().manual_seed(num_blocks + block_size)
        sizes = {"B": num_blocks, "L": num_layers, "H": NUM_KV_HEADS, "N": block_size, "C": 2 * head_size}
        pool = torch.randn([sizes[axis] for axis in layout], generator=generator)
        views = pool.permute([layout.index(axis) for axis in "LBHNC"])
        # Exact in every type, and so far apart that the order of summation does not matter.
        scale = torch.randint(1, 2**14, (num_layers, num_blocks, NUM_KV_HEADS, block_size), generator=generator)
        views[..., :head_size] = 0
        views[..., 0] = scale / 2**7
        self.key_dtype = dtype
        # vLLM stores quantized caches as bytes.
        pool = pool.to(dtype).view(torch.uint8 if dtype.itemsize == 1 else dtype).to(DEVICE).flatten(1)
        padded = torch.zeros(pool.shape[0], pool.shape[1] + padding, dtype=pool.dtype, device=DEVICE)
        padded[:, : pool.shape[1]] = pool
        pool = padded[:, : pool.shape[1]].view([sizes[axis] for axis in layout])
        self.views = pool.permute([layout.index(axis) for axis in "LBHNC"])
        self.head_size = head_size
        self.layers = list(self.views)
        self.numbers = range(3, 3 + num_layers)
        self.weights = made_up_weights(3 + num_layers, 2 * NUM_KV_HEADS, head_size, rope)
        heads = Heads.of_rank(self.numbers, 2 * NUM_KV_HEADS, 1, 2, self.views.device)
        self.scorers = bind(heads, self.weights)

    def leave(self, *heads: tuple[int, ...]) -> None:
        """Limits each layer to some of its heads; the compactor does not touch the others."""
        self.layers = [view[:, own[0] : own[-1] + 1] for view, own in zip(self.views, heads, strict=True)]
        of_layers = tuple(tuple(NUM_KV_HEADS + head for head in own) for own in heads)
        bound = Heads(tuple(self.numbers), of_layers, 2 * NUM_KV_HEADS, self.views.device)
        self.scorers = bind(bound, self.weights)

    def rows(self, layer: torch.Tensor) -> LayerRows:
        return LayerRows(layer[..., : self.head_size], layer[..., self.head_size :], self.key_dtype)

    def lives(self, *intervals: int, budget: int, num_positions: int, **params) -> list[Life]:
        """Returns requests with a budget and one of the intervals, which write random rows."""
        generator = torch.Generator().manual_seed(budget)
        num_layers, num_blocks, _, _, content = self.views.shape
        free = torch.randperm(num_blocks, generator=generator).tolist()
        asked = CompressionParams(max_tokens=budget, **params)
        lives = []
        for interval in intervals:
            contents = torch.randn(num_layers, NUM_KV_HEADS, num_positions, content, generator=generator)
            contents = contents.to(self.key_dtype).view(self.views.dtype)
            lives.append(Life(self.views, contents.to(DEVICE), asked, self.scorers, interval, free))
        return lives

    def compactor(self, max_num_tokens: int = 512) -> TritonCompactor:
        cache = GroupCache.of(self.layers, self.head_size, self.key_dtype)
        room = Scratch.of(cache.num_selections, self.head_size, max_num_tokens, self.views.device)
        return TritonCompactor(cache, self.scorers, 0, room)


def order(source, destination, n, num_keep, first=0, last=0, scorer="l2", granularity="token"):
    move = GroupMove(0, tuple(source), tuple(destination))
    params = CompressionParams(protect_first=first, protect_last=last, scorer=scorer, granularity=granularity)
    counts = {"num_rows": n, "num_keep": num_keep, "num_evicted": n - num_keep}
    return CompactionOrder(req_id="r", params=params, moves=(move,), **counts)


def tables(num_blocks: int, *counts: int) -> list[list[int]]:
    """Returns disjoint tables of shuffled blocks."""
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(num_blocks)).tolist()
    cuts = itertools.accumulate(counts, initial=0)
    return [blocks[begin:end] for begin, end in itertools.pairwise(cuts)]


def check(pool: Pool, orders: list[CompactionOrder], max_num_tokens: int = 512) -> None:
    expected = pool.views.clone()
    for i in range(pool.views.shape[0]):
        for o in orders:
            compact_layer(pool.rows(expected[i]), i, pool.scorers[o.params.scorer], o, o.move_of(0))
    pool.compactor(max_num_tokens).compact(orders)
    assert torch.equal(pool.views, expected)


LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 130, 1025]
if ON_GPU:
    LENGTHS += [1000, 1023, 1024, 2047, 2048, 2049, 30_000]


@pytest.mark.parametrize("n", LENGTHS)
def test_every_moved_row_is_equal(n):
    num_keep = max(n // 3, 1)
    counts = -(-n // 16), -(-num_keep // 16)
    source, destination = tables(sum(counts) + 3, *counts)
    check(Pool(sum(counts) + 3, 16), [order(source, destination, n, num_keep)], max_num_tokens=n)


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_head_sizes_and_layouts(head_size, layout):
    source, destination = tables(12, 6, 3)
    check(Pool(12, 16, head_size=head_size, layout=layout), [order(source, destination, 90, 40)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_types(dtype):
    source, destination = tables(12, 6, 3)
    check(Pool(12, 16, dtype=dtype), [order(source, destination, 90, 40)])


# Blocks 2**29 elements apart: offsets exceed 32 bits.
@pytest.mark.parametrize("padding", [4096, 2**29] if ON_GPU else [4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_padded_blocks(dtype, padding):
    source, destination = tables(9, 6, 3)
    check(Pool(9, 16, dtype=dtype, padding=padding), [order(source, destination, 90, 40)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_warming_up_touches_the_null_block_only(monkeypatch, dtype):
    if not ON_GPU:
        monkeypatch.setattr(triton_compactor, "TILES", (24, 40))
    pool = Pool(8, 16, dtype=dtype)
    before = pool.views.clone()
    pool.compactor(max_num_tokens=1100).warm_up()
    assert torch.equal(pool.views[:, 1:], before[:, 1:])


@pytest.mark.parametrize(("first", "last"), [(4, 0), (0, 9), (4, 9), (40, 0)])
def test_protection(first, last):
    source, destination = tables(12, 6, 3)
    check(Pool(12, 16), [order(source, destination, 90, 40, first, last)])


@pytest.mark.parametrize("num_keep", [1, 45, 89, 90])
def test_in_place(num_keep):
    (source,) = tables(12, 6)
    num_destination = -(-num_keep // 16)
    check(Pool(12, 16), [order(source, source[:num_destination], 90, num_keep)])


def test_several_orders_in_one_launch():
    a, b, c, d, e = tables(30, 6, 3, 4, 1, 5)
    orders = [order(a, b, 90, 40), order(c, d, 50, 10), order(e, e[:2], 70, 20, 2, 2)]
    check(Pool(30, 16), orders)


def test_more_orders_than_the_scratch_memory_holds():
    a, b, c, d = tables(30, 6, 3, 4, 1)
    check(Pool(30, 16), [order(a, b, 90, 40), order(c, d, 50, 10)], max_num_tokens=90)


def test_ties_go_to_the_lower_position():
    pool = Pool(8, 16)
    pool.views[..., : pool.head_size] = 1
    source, destination = tables(8, 4, 2)
    check(pool, [order(source, destination, 60, 21)])


def test_norms_of_random_keys_select_as_the_reference():
    """The order of summation changes last bits, so kept sets may differ, but only among keys that close to the edge."""
    pool = Pool(10, 16, dtype=torch.float32, head_size=64)
    pool.views.copy_(torch.randn(pool.views.shape, generator=torch.Generator().manual_seed(0)))
    source, destination = tables(10, 6, 3)
    before = pool.views.clone()
    pool.compactor().compact([order(source, destination, 90, 40)])
    for layer in range(pool.views.shape[0]):
        keys = before[layer][source][..., :64].transpose(0, 1).flatten(1, 2)[:, :90]
        kept = select(-norms(keys), 40)
        got = pool.views[layer][destination][..., :64].transpose(0, 1).flatten(1, 2)[:, :40]
        assert torch.allclose(norms(got).sort().values, norms(keys).gather(1, kept).sort().values, rtol=1e-6)


NEAR, NEAR_LEARNED, ERROR = 1e-5, 0.02, 3e-7
"""Distance within which rounding may decide between two scores (for `learned`, whose features are rounded to bf16), and
within which sums in another order may differ."""


def near(name: str, rows: Rows) -> float:
    """Returns the distance within which rounding may decide between two scores."""
    if name != "keydiff_value":
        return NEAR_LEARNED if name == "learned" else NEAR
    # A value at the edge between two levels may be in either, and changes its rank by the rows of one level.
    most = 0.0
    cosines, lengths = keydiff_value.keydiff.unlikeness(rows.keys), norms(rows.values)
    for measure, error in ((cosines, ERROR), (lengths, ERROR * lengths)):
        level, low, high = (keydiff_value.levels(measure + sign * error)[..., None] for sign in (0, -1, 1))
        in_two = (level.mT == low) | (level.mT == high)
        at_edge = low != high
        most += float((at_edge * in_two).sum(-1).max() + at_edge.sum(1).max())
    return most


def check_sets(pool: Pool, orders: list[CompactionOrder], compactor: TritonCompactor | None = None) -> None:
    """Checks like `check` if all rows differ, but heads may choose differently among rows whose scores are so close."""
    before = [layer.clone() for layer in pool.layers]
    (compactor or pool.compactor()).compact(orders)
    for o in orders:
        (move,), params = o.moves, o.params
        for layer, of_layer in enumerate(before):
            rows = pool.rows(of_layer)
            source = torch.tensor(move.source, device=DEVICE)
            keys, values = (read(part, source, o.num_rows) for part in rows[:2])
            seen = rows.seen(keys, values, layer)
            bound = near(params.scorer, seen)
            scores = pool_scores(pool.scorers[params.scorer].score(seen), params.granularity)
            kept = select(scores, o.num_keep, params.protect_first, params.protect_last).tolist()
            content = torch.cat([keys, values], dim=-1)
            slots = read(pool.layers[layer], torch.tensor(move.destination, device=DEVICE), o.num_keep)
            for head in range(of_layer.shape[1]):
                places = {row: place for place, row in enumerate(as_bytes(content[head]))}
                assert len(places) == o.num_rows
                got = [places[row] for row in as_bytes(slots[head])]
                assert got == sorted(set(got))
                free = range(params.protect_first, o.num_rows - params.protect_last)
                edge = min((scores[head, place] for place in kept[head] if place in free), default=None)
                for place in set(got) ^ set(kept[head]):
                    assert place in free
                    assert (scores[head, place] - edge).abs() <= bound


def as_bytes(rows: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.contiguous().view(torch.uint8).cpu().numpy()]


def random_pool(num_blocks: int, **shape) -> Pool:
    """Returns a pool of random keys and values, for which all scores differ."""
    pool = Pool(num_blocks, 16, **shape)
    rows = torch.randn(pool.views.shape, generator=torch.Generator().manual_seed(0))
    pool.views.copy_(rows.to(pool.key_dtype).view(pool.views.dtype))
    return pool


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(
    ("n", "granularity"),
    [(1, "token"), (1, "neighbors"), (5, "block"), (300, "token"), (300, "neighbors"), (300, "block")]
    + [(2500, "token"), (2500, "neighbors")] * ON_GPU,
)
def test_scores(scorer, granularity, n):
    """In one launch with an order of another scorer."""
    num_source, num_destination = -(-n // 16), -(-(n // 2 + 4) // 16)
    a, b, c, d = tables(num_source + num_destination + 12, num_source, num_destination, 6, 3)
    pool = random_pool(num_source + num_destination + 12, dtype=torch.float32)
    protected = min(n // 4, 2), min(n // 4, 3)
    orders = [order(c, d, 90, 40), order(a, b, n, n // 2 + 1, *protected, scorer, granularity)]
    check_sets(pool, orders, pool.compactor(max_num_tokens=n + 90))


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_of_layers_with_unequal_numbers_of_heads(scorer):
    """In one launch; by tokens, by neighbors, and by blocks, which each layer forms by itself."""
    a, b, c, d, e, f = tables(32, 6, 3, 4, 2, 5, 2)
    pool = random_pool(32, num_layers=3, dtype=torch.float32)
    pool.leave((0, 1), (1,), (0,))
    others = pool.views[1][:, 0].clone(), pool.views[2][:, 1].clone()
    orders = [order(a, b, 90, 40, 1, 2, scorer), order(c, d, 60, 20, 2, 1, scorer, "block")]
    check_sets(pool, [*orders, order(e, f, 70, 25, 0, 3, scorer, "neighbors")])
    assert torch.equal(pool.views[1][:, 0], others[0])
    assert torch.equal(pool.views[2][:, 1], others[1])


@pytest.mark.parametrize("scorer", OFFERED_SCORERS)
@pytest.mark.parametrize(("dtype", "head_size"), [(torch.float16, 64), (torch.bfloat16, 80), (torch.float8_e4m3fn, 32)])
def test_scores_of_types_and_head_sizes(scorer, dtype, head_size):
    source, destination = tables(12, 6, 3)
    pool = random_pool(12, dtype=dtype, head_size=head_size)
    check_sets(pool, [order(source, destination, 90, 40, 1, 2, scorer)])


@pytest.mark.parametrize(
    "rope", [Rope(64, True), Rope(32, False), Rope(40, True), Rope(64, True, 9), Rope(40, True, 20), Rope(0, False)]
)
def test_learned_scores_of_other_rotary_embeddings(rope):
    """Interleaved pairs; some, none or all slow; partly rotated keys; sizes that are not powers of two."""
    source, destination = tables(12, 6, 3)
    check_sets(random_pool(12, rope=rope), [order(source, destination, 90, 40, scorer="learned")])


def test_orders_of_one_scorer_in_one_launch(monkeypatch):
    """The lengths are not multiples of a tile."""
    monkeypatch.setattr(keydiff, "PART", 64)
    a, b, c, d, e, f = tables(60, 13, 3, 4, 1, 10, 2)
    orders = [order(*o, scorer="keydiff") for o in ((a, b, 200, 40), (c, d, 64, 10), (e, f, 150, 20))]
    check_sets(random_pool(60), orders)


def test_ranks_of_several_tiles_and_of_one_selection_at_a_time(monkeypatch):
    monkeypatch.setattr(ranks, "TILE", 32)
    monkeypatch.setattr(ranks, "MOST_BYTES", 1)
    monkeypatch.setattr(scratch, "MAX_ORDERS", 2)  # otherwise the sums of keydiff would leave room for more
    a, b, c, d = tables(30, 13, 3, 4, 1)
    orders = [order(*o, 1, 1, scorer="keydiff_value") for o in ((a, b, 200, 40), (c, d, 50, 10))]
    pool = random_pool(30)
    # Values of very different norms, so that scores differ clearly.
    scales = torch.randint(-60, 60, pool.views.shape[:-1], generator=torch.Generator().manual_seed(1))
    pool.views[..., pool.head_size :] *= (2.0**scales).unsqueeze(-1).to(pool.views)
    compactor = pool.compactor(max_num_tokens=250)
    batch = Batch.of(compactor.cache, orders, 0)
    assert len(ranks.selections_at_once(batch, compactor._scratch.work)) == compactor.cache.num_selections
    check_sets(pool, orders, compactor)


def test_equal_ranks_go_by_the_place():
    """Keys and values have few distinct values, some of them NaN."""
    pool = Pool(12, 16, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(5, pool.views.shape[-1], generator=generator)
    kinds[1] = 0
    kinds[2, pool.head_size :] = torch.inf
    kinds[3, pool.head_size :] = torch.nan
    pool.views.copy_(kinds[torch.randint(5, pool.views.shape[:-1], generator=generator)])
    source, destination = tables(12, 6, 3)
    expected = pool.views.clone()
    asked = order(source, destination, 90, 40, scorer="keydiff_value")
    for i in range(pool.views.shape[0]):
        compact_layer(pool.rows(expected[i]), i, pool.scorers["keydiff_value"], asked, asked.move_of(0))
    pool.compactor().compact([asked])
    assert torch.equal(pool.views.nan_to_num(7), expected.nan_to_num(7))


WAYS = [
    pytest.param([False] * 3, id="fresh"),
    pytest.param([True] * 3, id="in place"),
    pytest.param([False, True, False], id="mixed"),
]


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize(("first", "last"), [(0, 0), (4, 9), (4, 36)])
def test_compaction_after_compaction(ways, first, last):
    """Two requests with a budget in one launch. The protected rows may exceed the new ones."""
    pool = Pool(20, 16, dtype=torch.float32, head_size=32)
    lives = pool.lives(30, 7, budget=40, num_positions=140, protect_first=first, protect_last=last)
    # Keys with one nonzero element: norms are exact in any order of summation.
    for life in lives:
        life.contents[..., 1:32] = 0
    check_lives(lives, pool.compactor().compact, ways)


@pytest.mark.parametrize("scorer", ["keydiff", "keydiff_value", "learned"])
def test_scores_after_a_compaction(scorer):
    """Scratch memory holds exactly the budget and the longer interval."""
    pool = Pool(20, 16, dtype=torch.float32, head_size=32)
    lives = pool.lives(30, 7, budget=40, num_positions=140, protect_first=4, protect_last=9, scorer=scorer)
    check_lives(lives, pool.compactor(max_num_tokens=40 + 30).compact, [False, True, False])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("num_keep", [1, 40, 89])
def test_blocks_of_tokens(dtype, num_keep):
    """In a cache with longer blocks, in one launch with an order by tokens."""
    a, b, c, d = tables(16, 3, -(-(num_keep + 3) // 32), 2, 1)
    orders = [order(a, b, 90, num_keep, 93, granularity="block"), order(c, d, 50, 10)]
    check(Pool(16, 32, dtype=dtype), orders)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 128, 200])
def test_neighbors_across_tiles(monkeypatch, n):
    """Integers, whose means over neighbors are the reference's in every bit; in one launch with a shorter order."""
    monkeypatch.setattr(finish, "ROWS", 64)
    num_source = -(-n // 16)
    a, b, c, d = tables(num_source + 20, num_source, 13, 2, 1)
    pool = Pool(num_source + 20, 16, dtype=torch.float32)
    batch = Batch.of(pool.compactor().cache, [order(a, b, n, 1), order(c, d, 30, 1)], 0)
    sizes = [n, 30]
    generator = torch.Generator().manual_seed(n)
    raw = [torch.randint(-99, 99, (batch.cache.num_selections, size), generator=generator).float() for size in sizes]
    scores = torch.cat([part.flatten() for part in raw]).to(DEVICE).view(torch.int32)
    finish.finish(batch, scores, "neighbors")
    for part, keys in zip(raw, scores.cpu().split([part.numel() for part in raw]), strict=True):
        expected = pool_scores(part, "neighbors")
        # Keys are in descending order of the scores, and equal where they are equal.
        order_of = [torch.unique(each, return_inverse=True)[1] for each in (-expected, keys.view(part.shape))]
        assert torch.equal(*order_of)


def test_layers_must_be_alike():
    pool = Pool(4, 16)
    with pytest.raises(ValueError, match="differ"):
        GroupCache.of([pool.views[0], pool.views[1][:2]], 64)


# --- slots


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [5, 1, 40], [2000, 1]])
def test_slot_mappings_against_a_loop(lengths):
    num_reqs, max_num_reqs, block_sizes = len(lengths), 8, [64, 16, 8]
    generator = torch.Generator().manual_seed(sum(lengths))
    states = torch.randperm(max_num_reqs, generator=generator)[:num_reqs].to(torch.int32)
    starts = torch.randint(200, 400, (num_reqs,), generator=generator)
    evicted = torch.randint(0, 200, (max_num_reqs,), generator=generator).to(torch.int32)
    group_tables = [
        torch.randint(1, 10_000, (max_num_reqs, 256), generator=generator).to(torch.int32) for _ in block_sizes
    ]
    query_start_loc = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([start + torch.arange(n) for start, n in zip(starts, lengths, strict=True)])
    num_tokens, max_num_tokens = sum(lengths), sum(lengths) + 10

    expected = torch.full((3, max_num_tokens), -1)
    for group, block_size in enumerate(block_sizes[:2]):  # the third holds states
        for i in range(num_reqs):
            for token in range(int(query_start_loc[i]), int(query_start_loc[i + 1])):
                slot = int(positions[token]) - (int(evicted[states[i]]) if group == 1 else 0)
                block = int(group_tables[group][states[i], slot // block_size])
                expected[group, token] = block * block_size + slot % block_size

    on_device = [table.to(DEVICE) for table in group_tables]
    out = torch.full((3, max_num_tokens), -7, device=DEVICE)
    slots.slot_mappings(
        out,
        states.to(DEVICE),
        query_start_loc.to(DEVICE),
        positions.to(DEVICE),
        evicted.to(DEVICE),
        torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE),
        torch.tensor([table.data_ptr() for table in on_device], dtype=torch.uint64, device=DEVICE),
        torch.tensor([table.stride(0) for table in on_device], device=DEVICE),
        torch.tensor(block_sizes, dtype=torch.int32, device=DEVICE),
        torch.tensor([True, True, False], device=DEVICE),
    )
    assert torch.equal(out.cpu(), expected)
    assert num_tokens < max_num_tokens


def test_physical_lengths_leave_padding_alone():
    out = torch.full((5,), -7, dtype=torch.int32, device=DEVICE)
    seq_lens = torch.tensor([100, 50, 70, 0, 3], dtype=torch.int32, device=DEVICE)
    idx_mapping = torch.tensor([2, 0, -1], dtype=torch.int32, device=DEVICE)
    num_evicted = torch.tensor([5, 1000, 90], dtype=torch.int32, device=DEVICE)
    slots.physical_lengths(out, seq_lens, idx_mapping, num_evicted)
    assert out.tolist() == [10, 45, 70, 0, 3]
