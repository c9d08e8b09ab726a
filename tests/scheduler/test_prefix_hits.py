"""Prefix-cache hits where the two classes of layers have blocks of different sizes."""

import random

import pytest


def add(harness, req_id: str, prompt: list[int], max_tokens: int = 4, ratio: float = 1.0):
    return harness.submit(req_id, prompt, {"kv_keep_ratio": ratio}, max_tokens)


def hit_tokens(harness, req_id: str, prompt: list[int], **arguments) -> int:
    add(harness, req_id, prompt, **arguments)
    harness.run()
    return hits_of(harness)[req_id]


def hits_of(harness) -> dict[str, int]:
    """Returns the computed tokens that each request found when it was first scheduled."""
    hits: dict[str, int] = {}
    for step in harness.steps:
        for new in step.scheduled_new_reqs:
            hits.setdefault(new.req_id, new.num_computed_tokens)
    return hits


def different(begin: int, n: int) -> list[int]:
    return list(range(begin, begin + n))


@pytest.fixture(params=[1, 2])
def harness(make_harness, request):
    """Blocks have 64 tokens in the one full layer, 16 in the four others."""
    return make_harness(200, full_layers=(0,), depth=request.param)


@pytest.fixture
def turned_round(make_harness):
    """Four full layers, so that the one compressed layer has the large blocks."""
    return make_harness(200, full_layers=(0, 1, 2, 3))


@pytest.mark.parametrize("shared", [16, 40, 63, 64, 70, 100, 129])
def test_prompts_that_part_inside_a_large_block_share_what_they_can(harness, shared):
    common = different(0, shared)
    assert hit_tokens(harness, "first", common + different(1000, 90)) == 0
    assert hit_tokens(harness, "second", common + different(2000, 50)) == shared // 16 * 16
    assert hit_tokens(harness, "third", common + different(3000, 7)) == shared // 16 * 16


def test_a_prompt_cut_into_chunks_is_found_at_every_boundary(harness):
    prompt = different(0, 300)  # chunks of 64
    hit_tokens(harness, "first", prompt)
    for shared in (290, 250, 180, 64, 33):
        assert hit_tokens(harness, f"{shared}", prompt[:shared] + [9999] * 20) == shared // 16 * 16


def test_generated_tokens_are_found_unless_the_request_was_compacted(harness):
    prompt = different(0, 60)
    hit_tokens(harness, "plain", prompt, max_tokens=60)
    generated = harness.outputs["plain"]
    # The last generated token is not computed.
    assert hit_tokens(harness, "next turn", [*prompt, *generated, 5000]) == (60 + 59) // 16 * 16
    assert harness.scheduler.kv_cache_manager.reset_prefix_cache()
    hit_tokens(harness, "compacted", prompt, max_tokens=60, ratio=0.5)
    assert hit_tokens(harness, "its next turn", [*prompt, *harness.outputs["compacted"], 5000]) == 48


def test_large_blocks_of_compressed_layers_are_shared_inside_too(turned_round):
    assert turned_round.compressed.block_size == 64
    common = different(0, 100)
    hit_tokens(turned_round, "first", common + different(1000, 90), ratio=0.5)
    assert hit_tokens(turned_round, "second", common + different(2000, 50), ratio=0.25) == 96
    assert hit_tokens(turned_round, "third", common + different(3000, 50)) == 96


def test_a_hit_inside_a_block_copies_it(harness):
    common = different(0, 40)
    first = add(harness, "first", common + different(1000, 90), max_tokens=30)
    for _ in range(4):
        harness.step()
    add(harness, "second", common + different(2000, 50))
    step = harness.step()
    ((source, destination),) = step.kv_cache_block_copies
    tables = harness.scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks
    assert source == tables[first.request_id][0].block_id
    assert destination == tables["second"][0].block_id
    assert source != destination
    harness.run()


def test_boundaries_are_forgotten_with_the_blocks(make_harness):
    harness = make_harness(14, full_layers=(0,))
    for i in range(4):
        add(harness, f"{i}", different(100 * i, 60), max_tokens=40)
    harness.run()
    assert harness.scheduler.kv_cache_manager.coordinator.single_type_managers[0].next_cacheable == {}


def test_hit_tokens_of_a_shared_prefix_load_are_those_of_stock_vllm(make_harness):
    """System prompts of 20 to 400 tokens with different questions; the pool holds a sixth of all tokens."""
    chance = random.Random(0)
    systems = [different(10_000 * i, chance.randrange(20, 400)) for i in range(12)]
    prompts = [
        chance.choice(systems) + [chance.randrange(1_000_000) for _ in range(chance.randrange(5, 120))]
        for _ in range(150)
    ]

    def total(full_layers, ratio) -> int:
        # The same memory: a block holds six layers' tokens in one group, those of five or of one in two.
        harness = make_harness(432 if full_layers else 360, full_layers=full_layers, depth=2, num_layers=6)
        for i, prompt in enumerate(prompts):
            add(harness, f"{i}", prompt, max_tokens=6, ratio=ratio)
            if i % 4 == 3:
                for _ in range(5):
                    harness.step()
        harness.run(3000)
        return sum(hits_of(harness).values())

    # One group of 16-token blocks without compression has the hits of stock vLLM.
    stock = total((), 1.0)
    assert stock > 0.3 * sum(map(len, prompts))
    assert total((0,), 1.0) >= 0.95 * stock
    assert total((0,), 0.5) >= 0.95 * stock
