"""The numbers of a request: a function of its parameters and of the length of its answer."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from usages import usage

from vllm_l2kv.capacity import Capacity, GroupCapacity
from vllm_l2kv.messages.usage import KeptWhole, why_whole
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import CompactionPoints, Intervals
from vllm_l2kv.scheduler.request_state import RequestState

INTERVALS = Intervals(20, 10)
LAYERS = GroupCapacity(448, False), GroupCapacity(32, True)
CACHE = Capacity(1000, LAYERS, max_model_len=1000, compressed_bytes=4, full_bytes=1)


@dataclass
class Lengths:
    """The attributes of vLLM's request that are read."""

    num_prompt_tokens: int
    num_tokens: int


def state_of(n: int, bound: int | None = None, **asked) -> RequestState:
    params = CompressionParams(**{"protect_first": 0, "protect_last": 0, **asked})
    points = CompactionPoints(n, params, INTERVALS) if params.compresses else None
    return RequestState(Lengths(n, n), CACHE, points, why_whole(n, params), bound)


def after(state: RequestState, answer: int) -> dict:
    state.request.num_tokens = state.request.num_prompt_tokens + answer
    return state.usage()


lives = st.fixed_dictionaries(
    {"n": st.integers(1, 80), "keep_ratio": st.sampled_from([1.0, 0.9, 0.5, 0.05])},
    optional={"max_tokens": st.integers(1, 40)},
)


@given(life=lives, lengths=st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_numbers_depend_on_the_length_of_the_answer_alone(life, lengths):
    """They do not depend on how many tokens come at once, or on how often they are computed."""
    state = state_of(**life)
    for length in sorted(lengths):
        assert after(state, length) == after(state_of(**life), length) == after(state, length)


@given(life=lives, length=st.integers(1, 100))
def test_a_compaction_counts_once_a_token_follows_it(life, length):
    """The first token of an answer comes from the rows before the compaction at the end of the prompt."""
    state = state_of(**life)
    num_computed = life["n"] + length - 1  # the last token of an answer is not computed
    past = [c for c in state.points.until(200) if c.position < num_computed] if state.points else []
    evicted = sum(compaction.num_rows - compaction.num_keep for compaction in past)
    reported = after(state, length)
    reason = {"reason": reported["reason"]} if "reason" in reported else {}
    assert reported == usage(life["n"], length, evicted, len(past), **reason)
    assert ("reason" in reported) == (not past and state.reason is not None)


def test_an_answer_under_a_budget():
    """16 rows and an interval of 10: at positions 26, 36, 46."""
    state = state_of(12, bound=40, max_tokens=16)
    assert after(state, 15) == usage(12, 15, max_tokens=40, reason=KeptWhole.BUDGET)
    assert after(state, 16) == usage(12, 16, evicted=10, max_tokens=40)
    assert after(state, 36) == usage(12, 36, evicted=30, compactions=3, max_tokens=40)


def test_a_prompt_under_a_budget():
    """At positions 36 and 56; the prompt ends with 20 rows, and the answer's interval is reached at 66."""
    state = state_of(60, max_tokens=16)
    assert after(state, 1) == usage(60, 1, evicted=40, compactions=2)
    assert after(state, 7) == usage(60, 7, evicted=40, compactions=2)
    assert after(state, 8) == usage(60, 8, evicted=50, compactions=3)


def test_a_reason_is_a_plain_string():
    assert type(after(state_of(10, keep_ratio=0.9, protect_first=10), 1)["reason"]) is str
