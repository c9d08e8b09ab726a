"""Small runs of the benchmarks of documents and conversations: their counts, not their times."""

import pytest

from benchmarks.speed import conversation, document, findable, popular
from benchmarks.speed.engines import blocks_of

pytestmark = pytest.mark.slow

BLOCK_OF_TOKENS = 32 * 28 * 3 * 64 * 2 * 4
"""Bytes of 32 tokens in the 28 compressed layers: a block of the pool."""


@pytest.fixture
def about(compressing):
    return {"engine": "l2kv", "num_gpus": 1, **blocks_of(compressing.llm)}


@pytest.fixture
def small(monkeypatch):
    """Sets constants of scenarios to small values."""

    def change(module, **constants):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)

    return change


def test_a_document_is_found_and_held_once(compressing, about, small):
    small(document, NUM_DOCUMENT_TOKENS=320, NUM_QUESTION_TOKENS=20, NUM_ANSWER_TOKENS=40, REPEATS=1, ASKERS=(1, 4))
    times, one, four = document.rows(compressing.llm, about, ["0.25"])
    assert times["cached_tokens"] == 320
    assert len(times["first_question_ms"]) == len(times["second_question_ms"]) == 1
    # 80 rows of 320 tokens are 2.5 blocks; each asker copies the partial block and continues there. It also needs its
    # own block of full layers, since the document's 320 tokens do not fill one.
    assert about["block_bytes"] == BLOCK_OF_TOKENS
    assert one["held_bytes"] <= 5 * BLOCK_OF_TOKENS
    assert one["held_bytes"] < four["held_bytes"] <= (2 + 4 * 3) * BLOCK_OF_TOKENS
    assert 320 * 2 + 80 * 28 + 20 * 30 < one["needed_bytes"] / (3 * 64 * 2 * 4) < 320 * 2 + 80 * 28 + 40 * 30
    compressing.check_whole()


def test_documents_are_counted_until_one_is_not_found(compressing, about, small):
    small(findable, CACHE_BYTES=29 * BLOCK_OF_TOKENS, NUM_DOCUMENT_TOKENS=320, NUM_QUESTION_TOKENS=20)
    small(findable, CASES=((None, None, 4), (0.25, None, 9)), NUM_SHORT_TOKENS=4)
    whole, compressed = findable.rows(compressing.llm, about, [])
    assert whole["num_found"] == 2  # 11 blocks each
    # 4 each; while it is computed, a document takes 11.
    assert 5 <= compressed["num_found"] <= 6
    compressing.check_whole()


def test_clients_ask_again_when_they_are_answered(compressing, about, small):
    small(popular, CACHE_BYTES=64 * BLOCK_OF_TOKENS, NUM_DOCUMENTS=3, NUM_DOCUMENT_TOKENS=320, NUM_QUESTION_TOKENS=20)
    small(popular, NUM_CLIENTS=3, NUM_ANSWER_TOKENS=4, SETTLE_SECONDS=0.5, MEASURED_SECONDS=2.0)
    small(popular, CASES=((0.25, None),))
    (row,) = popular.rows(compressing.llm, about, [])
    assert row["hit_rate"] == round(320 / 340, 4)
    assert row["num_first_tokens"] > 3
    assert row["median_first_token_ms"] <= row["p99_first_token_ms"]
    compressing.check_whole()


def test_a_conversation_grows_by_a_turn(compressing, about, small):
    small(conversation, CACHE_BYTES=200 * BLOCK_OF_TOKENS, NUM_CONVERSATIONS=1, NUM_TURNS=4, BUDGETS=(64,))
    small(conversation, NUM_USER_TOKENS=790, NUM_ANSWER_TOKENS=10)
    (row,) = conversation.rows(compressing.llm, about, [])
    # Compacted once it holds 2,048 tokens more than the budget, and found from then on.
    assert row["median_cached_tokens"] == [0, 768, 1568, 2112]
    assert len(row["median_first_token_ms"]) == 4
    compressing.check_whole()


def test_a_conversation_stops_in_time(compressing, about, small):
    small(conversation, CACHE_BYTES=200 * BLOCK_OF_TOKENS, NUM_CONVERSATIONS=2, BUDGETS=(64,), MOST_SECONDS=0.0)
    (row,) = conversation.rows(compressing.llm, about, [])
    assert row["median_first_token_ms"] == []
    compressing.check_whole()
