"""Rows from known answers, and tables and the page made from rows."""

import base64
import html
from typing import Any

import numpy as np
import pytest
from usages import usage

from vllm_l2kv.tools.bench.client import Answer
from vllm_l2kv.tools.bench.drive import Outcome
from vllm_l2kv.tools.bench.load import Planned
from vllm_l2kv.tools.bench.report import comparison, errors, shown, table, write_report
from vllm_l2kv.tools.bench.summary import request_row, spread, summarise
from vllm_l2kv.tools.bench.watch import Sample, Watch


def outcome(number: int, start_s: float, first_s: float, gap_s: float, num_tokens: int = 5, **usage: Any) -> Outcome:
    """Returns an answer with its first token after `first_s`, then one every `gap_s`; it ends with the last one."""
    times = [start_s + first_s + i * gap_s for i in range(num_tokens)]
    usage = {"prompt_tokens": 10, "completion_tokens": num_tokens, **usage}
    return Outcome(Planned(number, 0.0, 10, num_tokens), Answer(start_s, times[-1], times, usage), 0.25 * number)


def failed(number: int, error: str) -> Outcome:
    return Outcome(Planned(number, 0.0, 10, 5), Answer(100.0, 101.0, [100.5], {}, error), 0.0)


def kv_cache(kept: int) -> dict[str, Any]:
    return {"kv_cache": usage(10, 5, evicted=14 - kept, compactions=2)}


class TestSummary:
    ANSWERED = (outcome(0, 100.0, 0.5, 0.1, **kv_cache(5)), outcome(1, 101.0, 1.5, 0.2, **kv_cache(4)))

    def test_numbers_of_known_answers(self):
        row = summarise(self.ANSWERED, Watch())
        assert (row["num_requests"], row["num_failed"], row["errors"]) == (2, 0, {})
        assert row["duration_s"] == pytest.approx(3.3)  # 100 to 101 + 1.5 + 4 x 0.2
        assert row["requests_per_s"] == pytest.approx(2 / 3.3)
        assert row["output_tokens_per_s"] == pytest.approx(10 / 3.3)
        assert (row["prompt_tokens"], row["output_tokens"]) == (20, 10)
        assert row["first_token_s"]["p50"] == pytest.approx(1.0)
        assert row["inter_token_s"]["mean"] == pytest.approx(0.15)
        assert row["inter_token_s"]["p99"] == pytest.approx(0.2)
        assert row["per_output_token_s"]["p50"] == pytest.approx(0.15)
        assert row["end_to_end_s"]["mean"] == pytest.approx((0.9 + 2.3) / 2)
        assert (row["kept_tokens"], row["evicted_tokens"], row["compactions"]) == (9, 19, 4)
        assert row["memory_ratio"] == pytest.approx((28 + 4 * 9) / (5 * 28), abs=1e-4)
        assert row["tokens_per_event"] == 1
        assert row["max_late_s"] == 0.25

    def test_failures_are_counted_and_in_no_time(self):
        broken = [failed(2, "503 full"), failed(3, "503 full"), failed(4, "timeout after 1 s")]
        row = summarise([*self.ANSWERED, *broken], Watch())
        assert (row["num_requests"], row["num_failed"]) == (5, 3)
        assert row["errors"] == {"503 full": 2, "timeout after 1 s": 1}
        for name in ("first_token_s", "inter_token_s", "end_to_end_s", "output_tokens"):
            assert row[name] == summarise(self.ANSWERED, Watch())[name]

    @pytest.mark.parametrize("outcomes", [[], [failed(0, "500 no")]])
    def test_nothing_answered(self, outcomes):
        row = summarise(outcomes, Watch())
        assert row["num_failed"] == len(outcomes)
        assert row["output_tokens"] == 0
        for name in ("first_token_s", "inter_token_s", "kept_tokens", "running", "preemptions", "prefix_hits"):
            assert row[name] is None

    def test_levels_that_the_server_did_not_give(self):
        samples = [Sample(0.5, None, None, None, {}), Sample(1.0, 4, None, 0.5, {})]
        row = summarise([], Watch(samples))
        assert (row["running"], row["waiting"]) == ({"mean": 4, "max": 4}, None)
        assert row["kv_cache_usage"]["mean"] == 0.5

    def test_one_token_has_no_gap(self):
        row = summarise([outcome(0, 100.0, 0.5, 0.1, num_tokens=1)], Watch())
        assert row["first_token_s"]["p99"] == pytest.approx(0.5)
        assert row["inter_token_s"] is None
        assert row["per_output_token_s"] is None

    def test_several_tokens_an_event(self):
        late = outcome(0, 100.0, 0.5, 0.2, num_tokens=3, completion_tokens=9)
        row = summarise([late], Watch())
        assert row["tokens_per_event"] == 3
        assert row["inter_token_s"]["mean"] == pytest.approx(0.2)
        assert row["per_output_token_s"]["mean"] == pytest.approx(0.4 / 8)

    def test_what_was_watched(self):
        tokens, freed = "vllm_l2kv:logical_tokens", "vllm_l2kv:blocks_freed_total"
        samples = [
            Sample(0.5, 2, 0, 0.2, {"tree": 7, "process": 3}, {tokens: 2, freed: 5}),
            Sample(1.0, 4, 3, 0.6, {"tree": 5}, {tokens: 4, freed: 9}),
        ]
        counted = {
            "vllm:num_preemptions_total": 2.0,
            "vllm:prefix_cache_queries_total": 80.0,
            "vllm:prefix_cache_hits_total": 20.0,
            freed: 9.0,
        }
        row = summarise([], Watch(samples, counted, num_failed=1))
        assert row["running"] == {"mean": 3, "max": 4}
        assert row["waiting"] == {"mean": 1.5, "max": 3}
        assert row["kv_cache_usage"] == {"mean": pytest.approx(0.4), "max": 0.6}
        assert (row["preemptions"], row["prefix_hits"]) == (2, 0.25)
        assert row["memory"] == {"process": 3, "tree": 7}
        assert row["own_metrics"] == {freed: 9, tokens: 3}
        assert (row["num_samples"], row["num_samples_failed"]) == (2, 1)

    def test_percentiles(self):
        found = spread([float(number) for number in range(101)])
        assert found == {"mean": 50, "p50": 50, "p95": 95, "p99": 99}
        assert spread([3.0]) == {"mean": 3, "p50": 3, "p95": 3, "p99": 3}
        assert spread([]) is None

    def test_rows_of_requests(self):
        row = request_row(self.ANSWERED[1], begin_s=100.0)
        assert (row["number"], row["start_s"], row["error"]) == (1, 1.0, None)
        assert row["gaps_s"] == pytest.approx([0.2] * 4)
        assert row["kv_cache"]["kept_tokens"] == 4
        assert request_row(failed(2, "503 full"), 100.0)["error"] == "503 full"


def made_up(ratios=(1.0, 0.5), engines=("vllm-l2kv", "stock"), **changes: Any) -> list[dict[str, Any]]:
    """Returns rows in which vllm-l2kv is twice as fast as stock at a ratio of 0.5, and equally fast at 1."""
    rows = []
    for i, ratio in enumerate(ratios):
        for engine in engines:
            speed = 1 / ratio if engine == "vllm-l2kv" else 1.0
            outcomes = [outcome(n, 100.0 + n, 0.4 / speed, 0.1 / speed) for n in range(4)]
            watch = Watch([Sample(0.5, 4 * speed, 0, 0.5 / speed, {"tree": 2**30}, {})])
            about = {"engine": engine, "round": i, "keep_ratio": ratio, "model": "<i>tiny</i>", "vllm": "0.32.0"}
            load = {"arrivals": "4 clients", "shared_prefix": 0.0}
            rows.append({**about, "load": load, **summarise(outcomes, watch), **changes})
    return rows


def cells(lines: list[list[str]], name: str) -> list[str]:
    return next(line[1:] for line in lines if line[0] == name)


class TestReport:
    def test_ratios_stand_side_by_side(self):
        lines = table(made_up(), "vllm-l2kv")
        assert lines[0] == ["", "keep 1", "keep 0.5"]
        assert cells(lines, "first token, p50 (ms)") == ["400", "200"]
        assert cells(lines, "inter-token, p99 (ms)") == ["100", "50.0"]
        assert cells(lines, "KV cache in use, mean (%)") == ["50", "25"]
        assert cells(lines, "memory of all its processes, peak (GiB)") == ["1", "1"]
        assert cells(lines, "requests answered") == ["4", "4"]

    def test_metrics_that_were_not_measured_have_no_line(self):
        names = [line[0] for line in table(made_up(), "vllm-l2kv")]
        assert "preemptions" not in names
        assert "memory in use on GPUs, peak (GiB)" not in names

    def test_rounds_are_divided_by_stock_of_the_same_round(self):
        lines = comparison(made_up())
        assert cells(lines, "first token, p50 (ms)") == ["1.000", "0.500"]
        assert cells(lines, "requests running, mean") == ["1.000", "2.000"]
        assert comparison(made_up(engines=("vllm-l2kv",))) == []

    def test_budgets_are_named(self, tmp_path):
        rows = [*made_up(), *made_up(ratios=(1.0,), round=2, max_tokens=4096)]
        assert table(rows, "vllm-l2kv")[0] == ["", "keep 1", "keep 0.5", "budget 4,096"]
        assert table(rows, "stock")[0][-1] == "beside budget 4,096"
        assert comparison(rows)[0] == ["", "keep 1", "keep 0.5", "budget 4,096"]
        assert "beside budget 4,096" in write_report(rows, [], tmp_path).read_text()

    def test_rounds_of_one_engine_are_not_compared(self):
        assert comparison(made_up()[:-1])[0] == ["", "keep 1"]

    @pytest.mark.parametrize(
        ("number", "words"),
        [(None, "-"), (0, "0"), (3, "3"), (1234.5, "1,234"), (99.94, "99.9"), (34.04, "34.0"), (0.01234, "0.0123")],
    )
    def test_numbers(self, number, words):
        assert shown(number) == words

    def test_errors_are_reported(self, tmp_path):
        rows = made_up(errors={"503 <full>": 3})
        assert errors(rows).splitlines()[0] == "vllm-l2kv, keep 1: 3 x 503 <full>"
        page = write_report(rows, [], tmp_path).read_text()
        assert page.index("503 &lt;full&gt;") < page.index("<table>")

    @pytest.mark.parametrize("engines", [("vllm-l2kv",), ("vllm-l2kv", "stock")])
    def test_the_page_holds_everything(self, tmp_path, engines):
        rows = made_up(engines=engines)
        samples = [
            {"engine": row["engine"], "round": row["round"], "keep_ratio": row["keep_ratio"], "at_s": at}
            | {"kv_cache_usage": 0.5}
            for row in rows
            for at in (0.5, 1.0)
        ]
        path = write_report(rows, samples, tmp_path)
        text, plots = html.unescape(path.read_text()), list(tmp_path.glob("*.png"))
        assert len(plots) == text.count("<img ") == 6
        for plot in plots:
            assert base64.b64encode(plot.read_bytes()).decode() in text
        for engine in engines:
            assert f"<h2>{engine}</h2>" in text
            for line in table(rows, engine)[1:]:
                assert all(f"<td>{cell}</td>" in text for cell in line)
        assert ("<h2>vllm-l2kv / stock</h2>" in text) == (len(engines) == 2)
        assert "&lt;i&gt;tiny" in path.read_text()
        assert "http" not in path.read_text()

    def test_a_run_without_an_answer_is_drawn(self, tmp_path):
        rows = made_up(first_token_s=None, inter_token_s=None, end_to_end_s=None, running=None, own_metrics={})
        assert write_report(rows, [], tmp_path).exists()


def test_percentiles_are_those_of_numpy():
    values = [float(value) for value in np.random.default_rng(0).exponential(size=37)]
    ordered = sorted(values)
    found = spread(values)
    assert found["p50"] == ordered[18]
    assert ordered[34] <= found["p95"] <= ordered[35]
