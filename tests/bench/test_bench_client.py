"""Requests that succeed and that fail, and how many are in flight."""

import asyncio
import socket
import threading
from itertools import count

import httpx
import pytest

from vllm_l2kv.tools.bench.client import Answer, ask, body_of
from vllm_l2kv.tools.bench.drive import Outcome, drive
from vllm_l2kv.tools.bench.load import Lengths, Load, planned
from vllm_l2kv.tools.bench.watch import totals, watching

LENGTHS = Lengths(8, 8)


def answer_of(url: str, timeout_s: float = 10.0, ratio: float | None = 0.5) -> Answer:
    async def run() -> Answer:
        async with httpx.AsyncClient(base_url=url) as http:
            fields = {} if ratio is None else {"kv_keep_ratio": ratio}
            return await ask(http, body_of("fake", [5] * 10, 4, fields), timeout_s)

    return asyncio.run(run())


class TestAnswers:
    def test_the_body_asks_for_exact_lengths(self, ours):
        answer_of(ours.url)
        (body,) = ours.bodies
        assert body["prompt"] == [5] * 10
        assert body["max_tokens"] == body["min_tokens"] == 4
        assert body["ignore_eos"] is body["stream"] is body["stream_options"]["include_usage"] is True
        assert body["kv_keep_ratio"] == 0.5

    def test_each_token_is_timed(self, ours):
        answer = answer_of(ours.url)
        assert answer.error is None
        assert len(answer.times_s) == 4
        assert [answer.start_s, *answer.times_s, answer.end_s] == sorted(
            [answer.start_s, *answer.times_s, answer.end_s]
        )
        assert answer.usage["kv_cache"] == {
            "prompt_tokens": 10,
            "kept_tokens": 8,
            "evicted_tokens": 5,
            "compactions": 1,
            "memory_ratio": 0.6923,  # (13 + 4 * 8) / (5 * 13)
        }

    def test_stock_reports_nothing_about_kept_rows(self, start):
        assert answer_of(start(compresses=False).url, ratio=None).error is None

    @pytest.mark.parametrize(
        ("broken", "error"),
        [
            ((503, "Too many requests in the queue."), "503 Too many requests in the queue."),
            ((400, "x" * 500), "400 " + "x" * 196),
            ("error event", "500 The engine is dead."),
            ("no usage", "the answer has no usage"),
            ("short", "the answer has 1 tokens instead of 4"),
            ("not reported", "the usage has no kv_cache"),
        ],
    )
    def test_failures_are_named(self, start, broken, error):
        answer = answer_of(start(broken=lambda body: broken).url)
        assert answer.error == error
        assert answer.end_s > answer.start_s

    def test_a_hanging_server_is_a_timeout(self, start):
        assert answer_of(start(broken=lambda body: "hang").url, timeout_s=0.2).error == "timeout after 0.2 s"

    def test_no_server(self):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            answer = answer_of(f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert answer.error.startswith("ConnectError ")


def driven(url: str, load: Load) -> list[Outcome]:
    outcomes: list[Outcome] = []

    async def run() -> None:
        async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=None)) as http:

            async def send(request) -> Answer:
                body = body_of("fake", [request.number] * 8, request.num_output_tokens, {})
                return await ask(http, body, 10)

            await drive(load, planned(load), send, outcomes.append)

    asyncio.run(run())
    return outcomes


def meet(number: int):
    """Answers once so many requests are in flight; fails if there never are."""
    barrier = threading.Barrier(number)

    def wait(body):
        try:
            barrier.wait(timeout=20)
        except threading.BrokenBarrierError:
            return 500, "alone"
        return None

    return wait


class TestDrive:
    def test_clients_wait_for_their_answers(self, start):
        fake = start(broken=meet(3))
        outcomes = driven(fake.url, Load(LENGTHS, Lengths(2, 2), concurrency=3, num_requests=12))
        assert all(outcome.answer.error is None for outcome in outcomes)
        assert fake.most_at_once == 3
        assert sorted(body["prompt"][0] for body in fake.bodies) == list(range(12))
        assert sorted(outcome.planned.number for outcome in outcomes) == list(range(12))
        assert {outcome.late_s for outcome in outcomes} == {0.0}

    def test_arrivals_do_not_wait_for_answers(self, start):
        fake = start(broken=meet(20))
        load = Load(LENGTHS, Lengths(1, 1), rate=1000.0, num_requests=20)
        outcomes = driven(fake.url, load)
        assert all(outcome.answer.error is None for outcome in outcomes)
        assert fake.most_at_once == 20
        due = [request.due_s for request in planned(load)]
        begin = min(outcome.answer.start_s - outcome.planned.due_s for outcome in outcomes)
        for outcome in outcomes:
            assert outcome.planned.due_s == due[outcome.planned.number]
            assert outcome.answer.start_s - begin >= outcome.planned.due_s - 1e-6  # the first one, up to rounding
            assert outcome.late_s > 0

    def test_clients_stop_when_the_time_is_over(self, monkeypatch):
        clock = count()  # each look takes a second
        monkeypatch.setattr("vllm_l2kv.tools.bench.drive.perf_counter", lambda: next(clock))
        load, sent = Load(LENGTHS, Lengths(1, 1), concurrency=2, duration_s=5.0), []

        async def send(request) -> None:
            sent.append(request.number)
            await asyncio.sleep(0)

        asyncio.run(drive(load, planned(load), send, lambda outcome: None))
        assert sent == [0, 1, 2, 3, 4]  # at 1 to 5 s

    def test_failures_do_not_stop_other_requests(self, start):
        fake = start(broken=lambda body: (500, "no") if body["prompt"][0] % 2 else None)
        outcomes = driven(fake.url, Load(LENGTHS, Lengths(1, 1), concurrency=2, num_requests=10))
        assert len(outcomes) == 10
        assert [outcome.answer.error for outcome in outcomes].count("500 no") == 5


class TestWatch:
    def test_labels_are_added_up_and_shares_averaged(self, ours):
        found = totals(ours.metrics_text())
        assert found["vllm:num_requests_running"] == 5
        assert found["vllm:kv_cache_usage_perc"] == 0.5
        assert found["vllm:num_preemptions_total"] == 0
        assert found["process_resident_memory_bytes"] == 2**20
        assert "vllm:e2e_request_latency_seconds_count" not in found

    def watched(self, fake, looks: int = 2):
        async def run():
            async with (
                httpx.AsyncClient(base_url=fake.url) as http,
                watching(http, 0.01, lambda: {"tree": 7}) as watch,
            ):
                await ask(http, body_of("fake", [5] * 10, 4, {"kv_keep_ratio": 0.5}), 10)
                while len(watch.samples) < looks:
                    await asyncio.sleep(0.01)
            return watch

        return asyncio.run(run())

    def test_levels_are_sampled_and_counters_counted(self, start):
        watch = self.watched(start(hits=0.5))
        assert watch.num_failed == 0
        assert watch.counted["vllm:num_preemptions_total"] == 1
        assert watch.counted["vllm:prefix_cache_hits_total"] == 5
        assert watch.counted["vllm_l2kv:rows_evicted_total"] == 5
        for sample in watch.samples:
            assert (sample.running, sample.waiting, sample.kv_cache_usage) == (5, 1, 0.5)
            assert sample.memory == {"tree": 7, "process": 2**20}
            assert sample.own["vllm_l2kv:logical_tokens"] == 4
        assert watch.samples[0].at_s < watch.samples[1].at_s

    def test_a_server_without_metrics_is_not_an_error(self, start):
        watch = self.watched(start(metrics=False), looks=3)
        assert watch.counted == {}
        for sample in watch.samples:
            assert (sample.running, sample.waiting, sample.kv_cache_usage) == (None, None, None)
            assert sample.memory == {"tree": 7}
        assert watch.num_failed >= 3
