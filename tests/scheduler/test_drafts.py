"""Drafts and compactions: no draft is computed across a compaction, and none counts before it is accepted."""

import pytest
from worker_model import Rule, Tokens, WorkerModel

from vllm_l2kv.messages.orders import orders_of

NGRAMS = (("method", "ngram"), ("num_speculative_tokens", 3), ("prompt_lookup_min", 1), ("prompt_lookup_max", 2))
MODEL = (("method", "draft_model"), ("num_speculative_tokens", 3))
INTERVALS = {"prompt_interval": 64, "answer_interval": 6}


@pytest.fixture(params=[(1, NGRAMS), (2, NGRAMS), (2, MODEL)], ids=["one step", "two steps", "two steps, a model"])
def drafting(request, make_harness):
    depth, drafter = request.param
    harness = make_harness(200, depth=depth, block_size=4, drafter=drafter, **INTERVALS)
    managers = harness.scheduler.kv_cache_manager.coordinator.single_type_managers
    sizes = [manager.block_size for manager in managers]
    harness.worker = WorkerModel(sizes, {harness.compressed.kv_cache_group_id})
    harness.execute = harness.worker.execute
    return harness


def ask(harness, req_id: str, prompt: list[int], max_tokens: int = 40, ratio: float = 0.5, budget: int = 16) -> None:
    harness.worker.tokens[req_id] = Tokens(prompt, None)
    harness.worker.rules[req_id] = Rule(str(ratio), budget=budget, **INTERVALS)
    fields = {"kv_keep_ratio": ratio, "kv_max_tokens": budget, "kv_protect_first": 0, "kv_protect_last": 0}
    harness.submit(req_id, prompt, fields, max_tokens)


def test_each_compaction_is_exact(drafting):
    """The worker accepts some drafts and rejects others, and knows its computed tokens when a compaction is ordered."""
    for i in range(6):
        ask(drafting, f"r{i}", [5 + i] * (20 + i))
    drafting.run()
    assert {req_id: len(tokens) for req_id, tokens in drafting.outputs.items()} == {f"r{i}": 40 for i in range(6)}
    assert sum(len(orders_of(output)) for output in drafting.steps) > 20
    assert min(drafting.worker.drafts.values()) > 30


def test_padding_drafts_cross_no_compaction(drafting):
    """VLLM pads a request if all its tokens but one are found, and the model may accept the padding tokens."""
    for i in range(2):
        ask(drafting, f"r{i}", [5] * 21)
        drafting.run()
    assert {req_id: len(tokens) for req_id, tokens in drafting.outputs.items()} == {"r0": 40, "r1": 40}


def test_a_prompt_of_one_token_waits_where_it_would_be_padded_across_a_compaction(make_harness):
    """The request begins as soon as it is alone."""
    harness = make_harness(200, depth=2, block_size=4, drafter=NGRAMS, prompt_interval=64, answer_interval=1)
    harness.add("long", 20, max_tokens=30)
    harness.run_until(lambda: len(harness.outputs.get("long", ())) > 3)
    harness.add("short", 1, max_tokens=20, kv_max_tokens=1)
    harness.run_until(lambda: len(harness.outputs["long"]) > 10)
    assert not harness.outputs.get("short")
    harness.run()
    assert [len(harness.outputs[req_id]) for req_id in ("long", "short")] == [30, 20]


@pytest.mark.parametrize(
    ("depth", "drafter", "num_drafts"), [(1, (), 0), (1, NGRAMS, 3), (2, NGRAMS, 6), (2, MODEL, 9)]
)
def test_slots_of_drafts_are_counted(make_harness, depth, drafter, num_drafts):
    """Slots of each step in flight, and those that a model writes ahead."""
    harness = make_harness(200, depth=depth, block_size=4, drafter=drafter, **INTERVALS)
    assert harness.scheduler._capacity.num_drafts == num_drafts
