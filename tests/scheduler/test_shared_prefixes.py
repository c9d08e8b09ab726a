"""Documents and conversations: rows left by a compaction before the end of a prompt, and requests that find them."""

import pytest
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import get_group_id
from vllm.v1.request import RequestStatus

from vllm_l2kv.messages.orders import orders_of

DOCUMENT = list(range(100))
LONG = list(range(300))
WHOLE = {"kv_keep_ratio": 1.0}
"""Fields of an uncompressed request that reports its numbers."""


def fields(**changes):
    return {
        "kv_prefix_tokens": 100,
        "kv_keep_ratio": 0.5,
        "kv_protect_first": 0,
        "kv_protect_last": 0,
        **changes,
    }


def ask(harness, req_id: str, document=DOCUMENT, asked=None, **about):
    """Adds a unique question of ten tokens about a document."""
    question = [1000 + 10 * len(harness.scheduler.requests) + 500 * len(harness.usage) + i for i in range(10)]
    return harness.submit(req_id, [*document, *question], asked or fields(), 4, **about)


def image(name: str, offset: int, length: int) -> MultiModalFeatureSpec:
    """Returns an image of so many tokens of the prompt, identified by the hash of its pixels."""
    return MultiModalFeatureSpec(None, "image", identifier=name, mm_position=PlaceholderRange(offset, length))


def found(harness, req_id: str, **about) -> int:
    """Returns the tokens whose compacted rows a request found, after it has finished."""
    ask(harness, req_id, **about)
    harness.run()
    return harness.usage[req_id].get("found_tokens", 0)


def cached(harness, req_id: str, prompt) -> int:
    """Returns the tokens that an uncompressed request finds in the prefix cache."""
    harness.submit(req_id, prompt, WHOLE, 1)
    (new,) = harness.step().scheduled_new_reqs
    harness.run()
    return new.num_computed_tokens


def is_running(harness, req_id: str) -> bool:
    return harness.scheduler.requests[req_id].status == RequestStatus.RUNNING


def copy_of(harness, state):
    """Returns the findable blocks of a request's longest compacted prefix, by group; `None` if there are none."""
    state.prefixes.missed_at = -1
    hit = harness.scheduler._shared.find(state.prefixes)
    return None if hit is None else hit[1]


@pytest.fixture(params=[1, 2])
def harness(make_harness, request):
    """Blocks have 64 tokens in the one full layer, 16 in the four others."""
    return make_harness(200, full_layers=(0,), depth=request.param)


class TestFinding:
    def test_the_second_asker_computes_its_question(self, harness):
        assert found(harness, "first") == 0
        num_steps = len(harness.steps)
        assert found(harness, "second") == 100
        (begin,) = [step for step in harness.steps[num_steps:] if step.scheduled_new_reqs]
        assert begin.scheduled_new_reqs[0].num_computed_tokens == 100
        assert begin.num_scheduled_tokens["second"] == 10
        # 50 rows in blocks of 16, and 100 tokens in blocks of 64: the last block of each is copied.
        assert len(begin.kv_cache_block_copies) == 2
        first, second = harness.usage["first"], harness.usage["second"]
        assert {**first, "found_tokens": 100} == second
        assert second["compactions"] == 1

    @pytest.mark.parametrize(
        "about",
        [
            {"asked": fields(kv_keep_ratio=0.4)},
            {"asked": fields(kv_protect_first=1)},
            {"asked": fields(kv_protect_last=1)},
            {"asked": fields(kv_scorer="keydiff")},
            {"asked": fields(kv_granularity="block")},
            {"asked": fields(kv_prefix_tokens=96)},
            {"cache_salt": "another"},
            {"lora_request": LoRARequest("adapter", 1, "somewhere")},
            {"document": [*DOCUMENT[:-1], 5000]},
            {"document": [5000, *DOCUMENT[1:]]},
        ],
        ids=str,
    )
    def test_nothing_is_shared_across(self, harness, about):
        found(harness, "first")
        assert found(harness, "another", **about) == 0
        assert found(harness, "another again", **about) == about.get("asked", fields())["kv_prefix_tokens"]
        assert found(harness, "as the first") == 100

    @pytest.mark.parametrize("span", [(10, 20), (90, 10)], ids=["inside", "at the end"])
    def test_documents_with_other_images_share_nothing(self, harness, span):
        scheduler = harness.scheduler
        scheduler.max_num_encoder_input_tokens = 1000
        scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=1000)
        found(harness, "a cat", mm_features=[image("cat", *span)])
        assert found(harness, "a dog", mm_features=[image("dog", *span)]) == 0
        assert found(harness, "the cat again", mm_features=[image("cat", *span)]) == 100
        assert found(harness, "no image") == 0
        assert found(harness, "a cat elsewhere", mm_features=[image("cat", 40, 20)]) == 0

    def test_a_request_that_is_kept_whole_finds_whole_rows_only(self, harness):
        found(harness, "first")
        compressed_group = harness.compressed.kv_cache_group_id
        whole = {
            block.block_id
            for block in harness.pool.blocks
            if block.block_hash and get_group_id(block.block_hash) == compressed_group
            if block.block_hash_num_tokens != 100
        }
        assert len(whole) == 6
        harness.pool.evict_blocks(whole)
        assert cached(harness, "whole", [*DOCUMENT, 1]) == 0
        assert found(harness, "second") == 100

    def test_what_is_computed_on_found_rows_is_not_for_the_prefix_cache(self, harness):
        found(harness, "first")
        prompt = [*DOCUMENT, *range(4000, 4100)]
        harness.submit("second", prompt, fields(), 4)
        harness.run()
        assert harness.usage["second"]["found_tokens"] == 100
        assert cached(harness, "whole", [*prompt, 1]) == 96

    def test_a_conversation_begins_at_its_last_compaction_in_the_earlier_prompt(self, make_harness):
        harness = make_harness(200, (0,), prompt_interval=32, answer_interval=16)
        budget = {"kv_max_tokens": 64, "kv_protect_first": 0, "kv_protect_last": 0}
        prompt = list(range(200))  # compacted at 96, 128, 160, 192
        harness.submit("turn 1", prompt, budget, 40)
        harness.run()
        prompt += [*harness.outputs["turn 1"], *range(3000, 3030)]
        harness.submit("turn 2", prompt, budget, 4)
        harness.run()
        assert "found_tokens" not in harness.usage["turn 1"]
        assert harness.usage["turn 2"]["found_tokens"] == 192
        harness.submit("turn 3", [*prompt, *harness.outputs["turn 2"], 1], budget, 4)
        harness.run()
        assert harness.usage["turn 3"]["found_tokens"] == 192 + (len(prompt) - 1 - 192) // 32 * 32

    def test_what_a_request_leaves_at_the_end_of_its_prompt_is_its_own(self, harness):
        private = {"kv_keep_ratio": 0.5, "kv_protect_first": 0, "kv_protect_last": 0}
        for req_id in ("first", "second"):
            harness.submit(req_id, DOCUMENT, private, 20)
            harness.run()
        assert "found_tokens" not in harness.usage["second"]
        assert harness.usage["second"]["evicted_tokens"] == 50

    def test_a_reset_of_the_prefix_cache_drops_documents(self, harness):
        found(harness, "first")
        assert harness.scheduler.reset_prefix_cache()
        assert found(harness, "second") == 0
        assert found(harness, "third") == 100

    def test_a_request_that_does_not_read_the_cache_finds_nothing_and_publishes(self, harness):
        assert found(harness, "first", skip_reading_prefix_cache=True) == 0
        assert found(harness, "second", skip_reading_prefix_cache=True) == 0
        assert found(harness, "third") == 100

    def test_a_cache_without_room_for_the_copy(self, make_harness):
        """95 rows take six blocks of 16. With 13 more they need all seven, and the copy of the sixth is one more."""
        harness = make_harness(7, full_layers=())
        for req_id in ("first", "second"):
            assert found(harness, req_id, asked=fields(kv_keep_ratio=0.95)) == 0
        assert harness.finish_reasons["second"] == "length"


class TestCopies:
    def test_a_complete_copy_stays_the_only_one(self, harness):
        ask(harness, "first")
        state = harness.scheduler._states["first"]
        harness.run()
        blocks = copy_of(harness, state)
        assert [len(group) for group in blocks] == [2, 4]
        assert found(harness, "second", skip_reading_prefix_cache=True) == 0
        assert copy_of(harness, state) == blocks

    @pytest.mark.parametrize("lost", range(4))
    def test_what_is_left_of_an_incomplete_copy_is_forgotten(self, harness, lost):
        ask(harness, "first")
        state = harness.scheduler._states["first"]
        harness.run()
        _, old = copy_of(harness, state)
        harness.pool.evict_blocks({old[lost].block_id})
        assert copy_of(harness, state) is None
        assert found(harness, "second") == 0
        _, new = copy_of(harness, state)
        assert not {block.block_id for block in old} & {block.block_id for block in new}
        assert not any(block.block_hash for block in old)
        assert found(harness, "third") == 100

    def test_nothing_is_findable_before_it_is_certain_to_be_written(self, harness):
        ask(harness, "first")
        state = harness.scheduler._states["first"]
        is_compacted = False
        while not is_compacted:
            assert copy_of(harness, state) is None
            is_compacted = bool(orders_of(harness.step()))
        assert copy_of(harness, state) is not None

    def test_whole_blocks_of_a_document_are_reused_first(self, make_harness):
        harness = make_harness(40, full_layers=(0,))
        older, stranger = list(range(2000, 2064)), list(range(3000, 3300))
        cached(harness, "older", older)
        assert found(harness, "first") == 0
        assert cached(harness, "whole", [*DOCUMENT, 1]) == 96, "findable until then"
        cached(harness, "stranger", stranger)  # takes some findable blocks
        assert cached(harness, "older again", [*older, 1]) == 64
        assert found(harness, "second") == 100
        assert cached(harness, "whole again", [*DOCUMENT, 2]) < 96


class TestWaiting:
    """Chunks of 64 tokens: a document of 300 takes five steps."""

    def begin(self, harness) -> None:
        """One request computes the document, another waits for it."""
        ask(harness, "first", LONG, fields(kv_prefix_tokens=300))
        harness.step()
        ask(harness, "second", LONG, fields(kv_prefix_tokens=300))

    def test_requests_for_the_document_wait_and_later_ones_do_not(self, make_harness):
        harness = make_harness(200, (0,), max_num_batched_tokens=128, long_prefill_token_threshold=64)
        self.begin(harness)
        harness.submit("stranger", [7] * 20, None, 4)
        harness.step()
        assert is_running(harness, "stranger")
        assert not is_running(harness, "second")
        harness.run()
        assert harness.usage["second"]["found_tokens"] == 300

    def test_a_request_with_other_fields_does_not_wait(self, make_harness):
        harness = make_harness(200, (0,), max_num_batched_tokens=128, long_prefill_token_threshold=64)
        self.begin(harness)
        ask(harness, "other ratio", LONG, fields(kv_prefix_tokens=300, kv_keep_ratio=0.3))
        ask(harness, "reads no cache", LONG, fields(kv_prefix_tokens=300), skip_reading_prefix_cache=True)
        harness.step()
        harness.step()
        assert is_running(harness, "other ratio")
        assert is_running(harness, "reads no cache")
        assert not is_running(harness, "second")
        harness.run()

    def test_a_waiting_request_computes_it_if_the_other_is_aborted(self, harness):
        self.begin(harness)
        harness.step()
        assert not is_running(harness, "second")
        harness.scheduler.finish_requests("first", RequestStatus.FINISHED_ABORTED)
        harness.step()
        assert is_running(harness, "second")
        harness.run()
        assert harness.usage["second"]["found_tokens"] == 0

    def test_looking_costs_nothing_while_nothing_is_published(self, make_harness, monkeypatch):
        harness = make_harness(200, (0,))
        shared, counts = harness.scheduler._shared, {"hash": 0, "probe": 0}

        def counting(name, function):
            def count(*args):
                counts[name] += 1
                return function(*args)

            return count

        monkeypatch.setattr(shared, "_hash", counting("hash", shared._hash))
        monkeypatch.setattr(shared, "_find", counting("probe", shared._find))
        pool = harness.pool
        held = pool.get_new_blocks(pool.get_num_free_blocks())
        harness.compressed.req_to_blocks["another holder"] = held
        ask(harness, "waits")
        harness.step()
        hashed, probed = counts["hash"], counts["probe"]
        assert 0 < hashed < 10
        assert probed == 1
        for _ in range(20):
            harness.step()
        assert counts == {"hash": hashed, "probe": probed}
        pool.free_blocks(harness.compressed.req_to_blocks.pop("another holder"))
        harness.run()
        assert counts["hash"] == hashed
