"""Whole prompts loaded by a KV connector, as in the decoding engine of a prefill/decode pair.

vLLM's `DecodeBenchConnector` has all of a prompt but its last token. Engines refuse it; these tests use the scheduler
alone. `tests/compat/test_prefill_decode_pair.py` has a pair of servers.
"""

import pytest
from bare_scheduler import plan
from cpu_copies import pinned
from test_shared_prefixes import DOCUMENT, WHOLE, fields
from vllm.v1.outputs import KVConnectorOutput

from vllm_l2kv import refusals
from vllm_l2kv.messages.orders import orders_of
from vllm_l2kv.messages.usage import KeptWhole
from vllm_l2kv.scheduler.integrity import check_nothing_left
from vllm_l2kv.scheduler.transfers import DIVISION, Transfers, division_of

PROMPT = [*DOCUMENT, *range(700, 800)]
RATIO = {"kv_keep_ratio": 0.5, "kv_protect_first": 0, "kv_protect_last": 0}
BUDGET = {"kv_max_tokens": 64, "kv_protect_first": 0, "kv_protect_last": 0}
DECODED_ELSEWHERE = {"kv_transfer_params": {"do_remote_decode": True}}


@pytest.fixture(params=[False, True], ids=["in the step", "in the background"])
def harness(make_harness, monkeypatch, request):
    monkeypatch.setattr(refusals, "check_connector", lambda config: None)
    harness = make_harness(100, kv_connector="DecodeBenchConnector", prompt_interval=32, answer_interval=16)
    if request.param:
        receive_in_background(harness)
    return harness


def receive_in_background(harness) -> None:
    """Loads as NIXL does: a request waits for its rows while others run."""
    connector, expected = harness.scheduler.connector.connector, []
    look = connector.get_num_new_matched_tokens

    def look_and_wait(request, num_computed_tokens):
        num_tokens, _ = look(request, num_computed_tokens)
        return num_tokens, num_tokens > 0

    def order(request, blocks, num_external_tokens):
        if num_external_tokens:
            expected.append(request.request_id)
            connector.connector_scheduler._filled_requests.add(request.request_id)

    def transfer(output):
        received = {expected.pop()} if expected else set()
        return KVConnectorOutput(finished_recving=received)

    connector.get_num_new_matched_tokens, connector.update_state_after_alloc = look_and_wait, order
    harness.transfer = transfer


def begin_of(harness, asked, num_tokens: int = 4) -> int:
    """Returns the tokens that a request had when it began to compute, after it has finished."""
    harness.submit("asks", PROMPT, asked, num_tokens)
    harness.run()
    (begin,) = [step for step in harness.steps if step.scheduled_new_reqs]
    return begin.scheduled_new_reqs[0].num_computed_tokens


@pytest.mark.parametrize("asked", [None, WHOLE, RATIO], ids=str)
def test_a_prompt_is_taken_whole_and_compacted_at_its_end(harness, asked):
    assert begin_of(harness, asked) == len(PROMPT) - 1
    orders = [order for step in harness.steps for order in orders_of(step)]
    assert [(order.num_rows, order.num_keep) for order in orders] == ([(200, 100)] if asked == RATIO else [])
    assert not pinned(harness.scheduler)
    check_nothing_left(harness.scheduler)


def test_a_budget_compacts_in_the_answer(harness):
    """No compaction is due inside the prompt, so all of it is loaded."""
    assert begin_of(harness, {**BUDGET, "kv_max_tokens": 190}, num_tokens=30) == len(PROMPT) - 1
    assert [order.num_keep for step in harness.steps for order in orders_of(step)] == [190, 190]


@pytest.mark.parametrize("asked", [BUDGET, fields()], ids=["budget", "document"])
def test_a_prompt_that_is_compacted_inside_is_computed_here(harness, asked):
    """Tokens after a compaction must be computed on compacted rows, which a sender does not have."""
    assert begin_of(harness, asked) == 0
    assert harness.usage["asks"]["evicted_tokens"] > 0
    check_nothing_left(harness.scheduler)


class TestPair:
    """The connector in `Transfers`, as `NixlConnector` is."""

    @pytest.fixture
    def pair(self, harness):
        scheduler = harness.scheduler
        about = scheduler._external_bound, scheduler.kv_cache_config, scheduler.vllm_config
        scheduler.connector = Transfers(scheduler.connector.connector, *about)
        return harness

    @pytest.mark.parametrize("asked", [RATIO, BUDGET, fields()], ids=["ratio", "budget", "document"])
    def test_the_prefilling_engine_keeps_a_prompt_whole(self, pair, asked):
        """Else it would send the rows that are left as if they were all."""
        pair.submit("asks", PROMPT, {**asked, **DECODED_ELSEWHERE}, 4)
        pair.run()
        assert not any(orders_of(step) for step in pair.steps)
        assert pair.usage["asks"]["evicted_tokens"] == 0
        assert pair.usage["asks"]["reason"] == KeptWhole.DECODED_ELSEWHERE

    def test_an_engine_without_a_connector_compacts(self, make_harness):
        harness = make_harness(100)
        harness.submit("asks", PROMPT, {**RATIO, **DECODED_ELSEWHERE}, 4)
        harness.run()
        assert harness.usage["asks"]["evicted_tokens"] == 100

    @pytest.mark.parametrize(("division", "begin"), [("its own", len(PROMPT) - 1), ("another", 0), (None, 0)])
    def test_blocks_of_another_division_are_not_loaded(self, pair, division, begin, caplog):
        """Without one the prefilling engine has no vllm-l2kv."""
        sent = {"do_remote_prefill": True}
        if division is not None:
            sent[DIVISION] = pair.scheduler.connector._division if division == "its own" else division
        assert begin_of(pair, {**RATIO, "kv_transfer_params": sent}) == begin
        assert pair.usage["asks"]["evicted_tokens"] == 100
        assert ("Request asks computes its prompt itself" in caplog.text) == (begin == 0)

    def test_the_division_goes_along(self, pair, monkeypatch):
        connector = pair.scheduler.connector
        for said in ((True, {"do_remote_prefill": True}), (False, None)):
            monkeypatch.setattr(connector.connector, "request_finished_all_groups", lambda *_, said=said: said)
            waits, params = connector.request_finished_all_groups(None, ())
            assert waits == said[0]
            assert params == (said[1] and {**said[1], DIVISION: connector._division})

    def test_other_full_layers_are_another_division(self, make_harness, monkeypatch):
        monkeypatch.setattr(refusals, "check_connector", lambda config: None)
        schedulers = [make_harness(100, full).scheduler for full in ((0,), (1,), (), (0,))]
        divisions = [division_of(scheduler.kv_cache_config, scheduler.vllm_config) for scheduler in schedulers]
        assert len(set(divisions)) == 3
        assert divisions[0] == divisions[-1]


def test_the_division_names_layers_heads_sizes_and_ranks(llama):
    """Blocks of one head of a layer look like those of another head."""
    plans = [
        plan(llama, 10, **asked)
        for asked in (
            {},
            {"full_layers": (1,)},
            {"num_layers": 6},
            {"block_size": 32},
            {"full_layers": (), "full_heads": ((1, (0,)),)},
            {"full_layers": (), "full_heads": ((1, (1,)),)},
        )
    ]
    divisions = [division_of(made.kv_cache_config, made.config) for made in plans]
    plans[0].config.parallel_config.tensor_parallel_size = 2
    divisions.append(division_of(plans[0].kv_cache_config, plans[0].config))
    assert len(set(divisions)) == len(divisions)
    again = plan(llama, 20)
    assert division_of(again.kv_cache_config, again.config) == divisions[0]
