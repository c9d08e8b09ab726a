"""Lines of progress, on a terminal and elsewhere."""

import io
import time

import pytest

from vllm_l2kv.tools.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_line_has_work_progress_and_time(clock):
    progress = Progress(clock=clock)
    progress.begin("starting the engine")
    clock.now = 75.4
    assert progress.line() == "starting the engine, 1 min 15 s"
    progress.begin("passkey")
    progress.part("passkey: prompts 1 to 5 of 50", 5, "read")
    clock.now += 10
    progress.advance(2)
    assert progress.line() == "passkey: prompts 1 to 5 of 50, 2 of 5 read, 10 s"
    progress.part("passkey: prompts 1 to 5 of 50, 85 answers", 1360, "tokens")
    clock.now += 20
    assert progress.line() == "passkey: prompts 1 to 5 of 50, 85 answers, 0 of 1,360 tokens, 30 s"


def test_the_remaining_time_is_estimated_from_similar_work(clock):
    """Prefill and decoding take different times, so there is no estimate within a group of prompts."""
    progress = Progress(clock=clock)
    progress.begin("passkey")
    clock.now = 30
    progress.reached(0.25)
    progress.part("passkey: prompts 6 to 10 of 20", 5, "read")
    clock.now = 40
    assert progress.line() == "passkey: prompts 6 to 10 of 20, 0 of 5 read, 40 s, about 1 min 20 s left"
    clock.now = 500
    assert progress.line().endswith(", about 0 s left")
    progress.reached(1)
    assert "left" not in progress.line()
    progress.begin("drawing")
    assert progress.line() == "drawing, 0 s"


def test_lines_appear_while_there_is_no_progress():
    """They come during the work, not once at its end: a step of an engine may take long."""
    stream = io.StringIO()
    with Progress(stream, interval_s=0.01) as progress:
        progress.begin("answering")
        assert stream.getvalue() == "answering, 0 s\n"  # at once
        deadline = time.monotonic() + 10
        while stream.getvalue().count("\n") < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 4
    assert all(line.startswith("answering, ") for line in lines)
    ended = stream.getvalue()
    time.sleep(0.05)
    assert stream.getvalue() == ended


def test_a_terminal_has_one_line_that_is_cleared_at_the_end():
    stream = io.StringIO()
    with Progress(stream, in_place=True, interval_s=60) as progress:
        progress.begin("answering")
        progress.begin("drawing")
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().split("\r\x1b[K") == ["", "answering, 0 s", "drawing, 0 s", ""]


def test_a_silent_one_writes_nothing(capfd):
    with Progress() as progress:
        progress.begin("answering")
        progress.advance(1)
    assert capfd.readouterr() == ("", "")
