"""Streaming-input sessions: a request whose prompt comes in chunks, each answered before the next one is computed."""

import pytest
from usages import usage
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.request import RequestStatus

from vllm_l2kv.messages.orders import orders_of
from vllm_l2kv.messages.usage import KeptWhole
from vllm_l2kv.scheduler.integrity import check_nothing_left

HALF = {"kv_keep_ratio": 0.5}
WHOLE = {"kv_keep_ratio": 1}
MAX_TOKENS = 5


@pytest.fixture(params=[1, 2], ids=["sync", "async"])
def harness(request, make_harness):
    return make_harness(100, depth=request.param, max_num_batched_tokens=256)


def say(harness, chunk: list[int], extra_args: dict | None, req_id: str = "session") -> None:
    harness.submit(req_id, chunk, extra_args, MAX_TOKENS, resumable=True)


def end(harness, extra_args: dict | None, req_id: str = "session") -> None:
    """Ends a session as `AsyncLLM` does: by a request of one token, which is not computed."""
    harness.submit(req_id, [0], extra_args, MAX_TOKENS)


def steps(harness, num_steps: int = 20) -> None:
    for _ in range(num_steps):
        harness.step()


def defaults(harness, keep_ratio: float) -> None:
    settings = harness.scheduler.settings
    harness.scheduler.settings = type(settings)(
        (0,), defaults=settings.defaults.override({"kv_keep_ratio": keep_ratio})
    )


def check_whole(harness) -> None:
    harness.run()
    assert harness.pool.get_num_free_blocks() == 100
    check_nothing_left(harness.scheduler)


@pytest.mark.parametrize(
    ("keep_ratio", "extra_args", "reason"),
    [(1, None, None), (1, WHOLE, None), (0.5, None, KeptWhole.SESSION), (0.5, WHOLE, None)],
)
@pytest.mark.parametrize("ahead", [True, False], ids=["chunks are early", "chunks are late"])
def test_a_session_without_fields_equals_stock_vllm(harness, keep_ratio, extra_args, reason, ahead):
    """Its numbers cover the tokens computed for an answer: the chunks so far and the answers between them."""
    defaults(harness, keep_ratio)
    reported = []
    for length in (50, 7, 40):
        say(harness, [1] * length, extra_args)
        if not ahead:
            steps(harness)
            reported.append(harness.usage.get("session"))
    end(harness, extra_args)
    harness.run()
    assert not [order for output in harness.steps for order in orders_of(output)]
    assert harness.outputs["session"] == [7] * 3 * MAX_TOKENS
    reported.append(harness.usage.get("session"))
    kept = MAX_TOKENS - 1  # the last token of an answer is not computed, and not part of the next prompt
    lengths = [50, 50 + kept + 7, 50 + kept + 7 + kept + 40]
    why = {} if reason is None else {"reason": reason}
    numbers = None if keep_ratio == 1 and extra_args is None else [usage(n, MAX_TOKENS, **why) for n in lengths]
    assert reported[-1] == (numbers and numbers[-1])
    if not ahead:
        assert reported[:3] == (numbers or [None] * 3)
    check_whole(harness)


@pytest.mark.parametrize("other", [None, WHOLE])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("ahead", [True, False], ids=["chunks are early", "chunks are late"])
@pytest.mark.parametrize("bad", [HALF, {"kv_keep_ratio": 7}, {"kv_kep_ratio": 0.5}], ids=str)
def test_a_session_that_asks_for_a_ratio_fails_alone(harness, other, which, ahead, bad):
    """Every chunk gets an answer, otherwise its caller would wait for ever; the session's end is not a new request."""
    harness.add("neighbour", 60, max_tokens=60, ratio=0.5)
    for i in range(3):
        say(harness, [1] * 30, bad if i == which else other)
        if not ahead:
            steps(harness)
    end(harness, other)
    harness.run()
    assert harness.outputs["neighbour"] == [7] * 60
    finished = [out for out in harness.received if out.request_id == "session" and out.finish_reason is not None]
    assert len(finished) == 3
    is_error = [out.finish_reason == FinishReason.ERROR for out in finished]
    assert is_error == ([True] * 3 if ahead else [i >= which for i in range(3)])
    sentences = {out.stop_reason for out in finished if out.finish_reason == FinishReason.ERROR}
    assert len(sentences) == 1
    assert "kv_keep_ratio" in sentences.pop()
    check_whole(harness)


@pytest.mark.parametrize("ends", ["end", "abort", "abort everything"])
def test_a_failed_session_is_forgotten_when_it_ends(harness, ends):
    say(harness, [1] * 30, HALF)
    steps(harness, 3)
    if ends == "end":
        end(harness, HALF)
    else:
        harness.scheduler.finish_requests(
            iter(["session"]) if ends == "abort" else None, RequestStatus.FINISHED_ABORTED
        )
    check_whole(harness)
    # The next request of this id is a new one.
    harness.outputs.clear()
    harness.submit("session", [1] * 30, WHOLE, MAX_TOKENS)
    harness.run()
    assert harness.outputs["session"] == [7] * MAX_TOKENS


def test_any_field_requests_compression(harness):
    """With an operator's ratio below 1, a session that names a scorer requests compression."""
    defaults(harness, 0.5)
    say(harness, [1] * 30, {"kv_scorer": "keydiff"})
    end(harness, None)
    harness.run()
    (out,) = [out for out in harness.received if out.finish_reason is not None]
    assert out.stop_reason == (
        "kv_keep_ratio must be 1 for streaming input (a prompt that comes in chunks), got 0.5; set it to 1, leave all "
        "kv_ fields out, or give the whole prompt at once."
    )


def test_the_last_output_reports_a_bad_value(harness):
    harness.add("r", 30, ratio=7)
    harness.run()
    *_, out = harness.received
    assert out.finish_reason == FinishReason.ERROR
    assert out.stop_reason == "kv_keep_ratio must satisfy 0 < kv_keep_ratio <= 1, got 7."
    assert read_by_a_client(out) == out.stop_reason


def read_by_a_client(out: EngineCoreOutput) -> str | int | None:
    """Returns what `AsyncLLM` makes from an output; since vLLM 0.33 it raises an error."""
    request = EngineCoreRequest(
        request_id=out.request_id,
        prompt_token_ids=[1] * 30,
        mm_features=None,
        sampling_params=SamplingParams(detokenize=False),
        pooling_params=None,
        arrival_time=0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id="r",
    )
    processor, queue = OutputProcessor(None, log_stats=False), RequestOutputCollector(RequestOutputKind.DELTA, "r")
    processor.add_request(request, None, queue=queue)
    processor.process_outputs([out])
    if "error" not in EngineCoreOutput.__struct_fields__:
        return queue.get_nowait().outputs[0].stop_reason
    with pytest.raises(VLLMValidationError) as raised:
        queue.get_nowait()
    return str(raised.value)
