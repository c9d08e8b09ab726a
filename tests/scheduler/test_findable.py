"""The number of compressed documents that stay findable, which depends on the order of reuse."""

import random

import pytest

DOCUMENT, QUESTION, BLOCK = 240, 5, 4
KEEP = DOCUMENT // 4
POOL = 300
"""Number of blocks. A document takes 60 of them until it is compacted, then 15."""


def ask(harness, name: str, document: list[int], question: int, **fields) -> int:
    """Asks about a document; returns the number of tokens that the first step did not compute."""
    prompt = document + [question] * QUESTION
    fields = {"kv_keep_ratio": 0.25, "kv_prefix_tokens": DOCUMENT, **fields}
    harness.submit(name, prompt, fields, 2)
    num_before = len(harness.steps)
    harness.run()
    (new,) = [new for output in harness.steps[num_before:] for new in output.scheduled_new_reqs]
    return new.num_computed_tokens


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("budget", "interval"), [(None, 20), (KEEP, 20), (KEEP, 120)])
def test_the_number_of_findable_documents_is_bounded_by_room_alone(make_harness, depth, budget, interval):
    """While one document is computed whole, the rest of the pool holds the compacted rows of others.

    Under a budget of the same rows a document is never held whole, so there is room for more. What its first compaction
    releases is reused before blocks of others: for later tokens of the document, and for the question.
    """
    harness = make_harness(
        POOL, (), depth, block_size=BLOCK, max_num_batched_tokens=64, prompt_interval=interval, num_layers=3
    )
    rng = random.Random(0)
    documents = [[rng.randrange(1000) for _ in range(DOCUMENT)] for _ in range(30)]
    fields = {} if budget is None else {"kv_max_tokens": budget}
    for i, document in enumerate(documents):
        assert ask(harness, f"first {i}", document, 1, **fields) == 0
    found = [ask(harness, f"again {i}", document, 2, **fields) for i, document in enumerate(reversed(documents))]
    num_found = sum(tokens == DOCUMENT for tokens in found)
    most_held = DOCUMENT if budget is None else KEEP + interval
    others = (POOL - most_held // BLOCK) // (KEEP // BLOCK)
    assert num_found == others + 1


def test_full_blocks_stay_findable_until_they_are_needed(make_harness):
    harness = make_harness(POOL, (), block_size=BLOCK, max_num_batched_tokens=64, num_layers=3)
    document = [*range(DOCUMENT)]
    assert ask(harness, "first", document, 1) == 0
    assert ask(harness, "other ratio", document, 2, kv_keep_ratio=0.5) == DOCUMENT - BLOCK
    assert ask(harness, "again", document, 3) == DOCUMENT
