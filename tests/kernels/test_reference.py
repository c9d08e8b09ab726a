"""The torch reference against loops that a reader can check by eye."""

import pytest
import torch
from lives import Life, check_lives
from weights import made_up_weights

from vllm_l2kv.kernels.reference import LayerRows, ReferenceCompactor, compact_layer, select
from vllm_l2kv.messages.orders import CompactionOrder, GroupMove
from vllm_l2kv.params import ONE_COMPACTION_SCORERS, SCORERS, CompressionParams
from vllm_l2kv.scorers import Heads, bind, norms
from vllm_l2kv.token_groups import pool_scores

HEADS, HEAD_SIZE = 3, 8
SCORERS_OF_TWO_LAYERS = bind(
    Heads.of_rank((1, 2), HEADS, 0, 1, torch.device("cpu")), made_up_weights(3, HEADS, HEAD_SIZE)
)


def random_rows(num_blocks: int, block_size: int, dtype: torch.dtype = torch.float32, head_size_v: int = HEAD_SIZE):
    generator = torch.Generator().manual_seed(num_blocks * 1000 + block_size)
    keys = torch.randn(num_blocks, HEADS, block_size, HEAD_SIZE, generator=generator).to(dtype)
    values = torch.randn(num_blocks, HEADS, block_size, head_size_v, generator=generator).to(dtype)
    return LayerRows(keys, values)


def row(cache: torch.Tensor, table: list[int], head: int, slot: int) -> torch.Tensor:
    block_size = cache.shape[2]
    return cache[table[slot // block_size], head, slot % block_size]


def means_of_blocks(rows: list[list[float]]) -> list[float]:
    """Returns for each position the mean over its block of 16 positions (fewer in the last block) and all heads."""
    means = []
    for position in range(len(rows[0])):
        begin = position - position % 16
        block = [x for row in rows for x in row[begin : begin + 16]]
        means.append(sum(block) / len(block))
    return means


def means_of_neighbors(norms: list[float]) -> list[float]:
    """Returns for each position the mean over it and the positions beside it."""
    return [sum(beside) / len(beside) for i in range(len(norms)) if (beside := norms[max(i - 1, 0) : i + 2])]


def check_compaction(rows, source, destination, n, num_keep, first=0, last=0, granularity="token"):
    before = LayerRows(rows.keys.clone(), rows.values.clone())
    move = GroupMove(0, tuple(source), tuple(destination))
    params = CompressionParams(protect_first=first, protect_last=last, granularity=granularity)
    counts = {"num_rows": n, "num_keep": num_keep, "num_evicted": n - num_keep}
    order = CompactionOrder(req_id="r", params=params, moves=(move,), **counts)
    compact_layer(rows, 1, SCORERS_OF_TWO_LAYERS["l2"], order, move)
    norms = [[row(before.keys, source, head, slot).float().norm().item() for slot in range(n)] for head in range(HEADS)]
    protected = [slot < first or slot >= n - last for slot in range(n)]
    if granularity == "block":
        norms = [means_of_blocks(norms)] * HEADS
    elif granularity == "neighbors":
        norms = [means_of_neighbors(of_head) for of_head in norms]
    for head in range(HEADS):
        kept = sorted(sorted(range(n), key=lambda slot: (not protected[slot], norms[head][slot], slot))[:num_keep])
        for slot, position in enumerate(kept):
            for new, old in zip(rows[:2], before[:2], strict=True):
                assert torch.equal(row(new, destination, head, slot), row(old, source, head, position))
    untouched = [block for block in range(rows.keys.shape[0]) if block not in destination]
    for new, old in zip(rows[:2], before[:2], strict=True):
        assert torch.equal(new[untouched], old[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 100])
def test_every_moved_row_is_equal(dtype, n):
    num_source = -(-n // 16)
    num_keep = max(n // 3, 1)
    num_destination = -(-num_keep // 16)
    rows = random_rows(num_source + num_destination + 2, 16, dtype)
    order = torch.randperm(num_source + num_destination + 2, generator=torch.Generator().manual_seed(n)).tolist()
    source, destination = order[:num_source], order[num_source : num_source + num_destination]
    check_compaction(rows, source, destination, n, num_keep)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (5, 0), (0, 7), (5, 7)])
def test_protected_rows_stay(first, last):
    check_compaction(random_rows(12, 16), [3, 1, 4, 11, 5], [2, 6], 70, 20, first, last)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 200])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (5, 0), (0, 7), (5, 7)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1])
@pytest.mark.parametrize("granularity", ["neighbors", "block"])
def test_pooled_scores(n, first, last, ratio, granularity):
    """In a cache with other blocks, of 24 tokens, shuffled."""
    num_keep = min(n, max(int(ratio * n), first + last, 1))
    table = torch.randperm(20, generator=torch.Generator().manual_seed(n)).tolist()
    rows = random_rows(20, 24)
    check_compaction(rows, table[:9], table[9:19], n, num_keep, first, last, granularity)


def test_in_place():
    check_compaction(random_rows(8, 16), [3, 1, 4, 6, 5], [1, 4], 70, 20)


@pytest.mark.parametrize("scorer", [scorer for scorer in SCORERS if scorer not in ONE_COMPACTION_SCORERS])
@pytest.mark.parametrize("ways", [[False] * 3, [True] * 3, [False, True, False]], ids=["fresh", "in place", "mixed"])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (4, 9), (4, 40)])
def test_compaction_after_compaction(scorer, ways, first, last):
    """Two requests with budgets, three times each. The protected rows may exceed the new ones."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.zeros(2, 24, HEADS, 16, 2 * HEAD_SIZE)
    blocks = torch.randperm(24, generator=generator).tolist()
    lives = [
        Life(
            cache,
            torch.randn(2, HEADS, 200, 2 * HEAD_SIZE, generator=generator),
            CompressionParams(max_tokens=budget, protect_first=first, protect_last=last, scorer=scorer),
            SCORERS_OF_TWO_LAYERS,
            interval,
            blocks,
        )
        for budget, interval in ((44, 30), (64, 7))
    ]
    layers = [LayerRows(*rows.chunk(2, dim=-1)) for rows in cache]
    check_lives(lives, ReferenceCompactor(0, layers, SCORERS_OF_TWO_LAYERS).compact, ways)


def test_values_may_be_wider_than_keys():
    check_compaction(random_rows(8, 16, head_size_v=2 * HEAD_SIZE), [3, 1], [0], 30, 10)


def test_keeping_everything_moves_everything():
    check_compaction(random_rows(8, 16), [3, 1], [0, 2], 30, 30)


def test_ties_go_to_the_lower_position():
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 1.0]])
    assert select(scores, 4).tolist() == [[0, 1, 2, 3]]
    assert select(torch.zeros(1, 1000), 10).tolist() == [list(range(10))]


def test_heads_choose_for_themselves():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    assert select(scores, 2).tolist() == [[0, 2], [1, 2]]


def test_blocks_are_chosen_by_the_mean_over_tokens_and_heads():
    """Blocks of 16, 16 and 3 tokens. A single head, sums or extremes would choose differently."""
    scores = torch.zeros(2, 35)
    scores[0, :16], scores[0, 16:32], scores[0, 32:] = 3, 2, 9
    scores[1, :16], scores[1, 16:32], scores[1, 32:] = 0, 2, -4
    scores[1, 3] = 7
    shared = pool_scores(scores, "block")
    assert [shared[:, i].tolist() for i in (0, 16, 34)] == [[1.71875] * 2, [2] * 2, [2.5] * 2]
    assert select(shared, 8).tolist() == [[*range(16, 21), 32, 33, 34]] * 2
    assert select(shared, 20).tolist() == [[0, *range(16, 35)]] * 2
    assert select(shared, 9, protect_first=2, protect_last=1).tolist() == [[0, 1, *range(16, 20), 32, 33, 34]] * 2


def test_neighbors_share_their_scores_within_a_head():
    scores = torch.tensor([[0.0, 0, 9, 0, 0, 6, 3], [6.0, 0, 0, 0, 3, 0, 0]])
    pooled = pool_scores(scores, "neighbors")
    assert pooled.tolist() == [[0, 3, 3, 3, 2, 3, 4.5], [3, 2, 0, 1, 1, 1, 0]]
    assert select(pooled, 4).tolist() == [[1, 2, 3, 6], [0, 1, 3, 4]]


def test_one_broken_score_makes_its_neighbors_the_last():
    scores = torch.tensor([[5.0, 5, 5, float("nan"), 5, 0]])
    assert select(pool_scores(scores, "neighbors"), 3).tolist() == [[0, 1, 5]]


def test_scores_of_another_shape_are_refused():
    class OfElements:
        def score(self, rows):
            return rows.keys

    move = GroupMove(0, (0, 1), (0,))
    params = CompressionParams(scorer="mine:Own")
    order = CompactionOrder(req_id="r", num_rows=20, num_keep=9, num_evicted=11, params=params, moves=(move,))
    with pytest.raises(ValueError, match=r"scorer mine:Own must return a score for .* \[3, 20\], got \[3, 20, 8\]"):
        compact_layer(random_rows(2, 16), 0, OfElements(), order, move)


def test_equal_blocks_are_kept_in_the_order_of_their_positions():
    scores = torch.ones(2, 40)
    scores[:, 16:32:2] = 0
    scores[:, 17:32:2] = 2
    assert select(pool_scores(scores, "block"), 20).tolist() == [list(range(20))] * 2


@pytest.mark.parametrize("broken", [float("nan"), -float("inf")])
def test_one_broken_score_makes_its_block_the_last(broken):
    scores = torch.zeros(2, 48)
    scores[:, :16] = 5
    scores[1, 2] = broken
    assert select(pool_scores(scores, "block"), 33).tolist() == [[0, *range(16, 48)]] * 2


@pytest.mark.parametrize("granularity", ["neighbors", "block"])
def test_huge_scores_do_not_overflow(granularity):
    scores = torch.full((2, 48), 3e38)
    scores[:, 16:32] = torch.finfo(torch.float32).max
    assert select(pool_scores(scores, granularity), 16).tolist() == [list(range(16, 32))] * 2


def test_protection_beats_any_score_and_counts_in():
    scores = torch.tensor([[0.0, 9.0, 8.0, 7.0, 0.0]])
    assert select(scores, 3, protect_first=1, protect_last=1).tolist() == [[0, 1, 4]]


def test_lowest_norms_are_kept_in_fp32():
    """Norms that bf16 cannot distinguish."""
    keys = torch.zeros(1, 4, 2, dtype=torch.bfloat16)
    keys[0, :, 0] = 16.0
    keys[0, :, 1] = torch.tensor([0.5, 0.25, 0.75, 0.125], dtype=torch.bfloat16)
    assert norms(keys).dtype == torch.float32
    assert keys.norm(dim=-1).unique().numel() == 1
    assert select(-norms(keys), 2).tolist() == [[1, 3]]
