"""Intervals against scipy; reports of made-up rows."""

import base64
import html
import math
import re
from typing import Any

import pytest
from made_up import made_up
from scipy.stats import binomtest, ttest_1samp

from vllm_l2kv.tools.evaluation.aggregates import aggregates, with_excess_loss
from vllm_l2kv.tools.evaluation.report import (
    CAPTIONS,
    conditions,
    matrix,
    summary,
    table,
    write_report,
)
from vllm_l2kv.tools.evaluation.statistics import average, moments, pooled, share

NUM_PLOTS = {"perplexity": 3, "passkey": 2, "needle": 3, "ruler": 1, "copy": 1, "chat": 1}
NUM_METRICS = {"perplexity": 2, "passkey": 1, "needle": 2, "ruler": 1, "copy": 1, "chat": 1}


def cells_of(rows: list[dict[str, Any]], task: str, name: str, metric: str) -> list[str]:
    return next(line[2:] for line in table(aggregates(rows), task) if line[:2] == [name, metric])


class TestStatistics:
    @pytest.mark.parametrize(
        ("hits", "n"), [(0, 1), (1, 1), (0, 10), (10, 10), (1, 2), (3, 10), (81, 263), (999, 1000)]
    )
    def test_share_is_wilsons(self, hits, n):
        expected = binomtest(hits, n).proportion_ci(method="wilson")
        found = share(moments([1.0] * hits + [0.0] * (n - hits)))
        assert found == pytest.approx((hits / n, expected.low, expected.high, n), abs=1e-6)
        assert found.high - found.low > 1 / (n + 4)

    @pytest.mark.parametrize("score", [0.0, 1.0])
    def test_a_share_lies_within_its_interval(self, score):
        for n in range(1, 100):
            found = share(moments([score] * n))
            assert 0 <= found.low <= score <= found.high <= 1

    def test_shares_in_between(self):
        assert share(moments([0.25, 0.75])) == share(moments([0.0, 1.0]))

    @pytest.mark.parametrize("values", [[1.0, 2.0], [0.1, -0.4, 2.5, 0.3, 0.3]])
    def test_average_is_students(self, values):
        expected = ttest_1samp(values, 0).confidence_interval()
        mean = sum(values) / len(values)
        assert average(moments(values)) == pytest.approx((mean, expected.low, expected.high, len(values)))

    def test_one_value_has_no_interval(self):
        mean, low, high, num_samples = average(moments([3.0]))
        assert (mean, num_samples) == (3.0, 1)
        assert math.isnan(low)
        assert math.isnan(high)

    def test_values_that_agree(self):
        assert average(moments([3.0] * 5)) == (3.0, 3.0, 3.0, 5)

    @pytest.mark.parametrize("parts", [[[1.0], [2.0]], [[0.5, 7.0, -1.0], [3.0], [4.0, 4.5]], [[1.0, 2.0]]])
    def test_pooled_parts_are_the_whole(self, parts):
        assert pooled(map(moments, parts)) == pytest.approx(moments([value for part in parts for value in part]))


class TestReport:
    @pytest.mark.parametrize("task", NUM_PLOTS)
    def test_every_task_has_a_plot_and_a_text(self, tmp_path, task):
        rows = made_up(task)
        path = write_report(rows, tmp_path)
        text, plots = html.unescape(path.read_text()), list(tmp_path.glob("*.png"))
        assert path == tmp_path / "report.html"
        assert len(plots) == text.count("<img ") == NUM_PLOTS[task]
        for plot in plots:
            assert plot.read_bytes().startswith(b"\x89PNG")
            assert f"data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}" in text
        heading, *lines = table(aggregates(rows), task)
        assert heading == ["", "metric", "keep 1", "keep 0.5", "keep 0.25"]
        # No compression, and l2 and three controls, each with and without protection.
        assert len(lines) == (1 + 2 * 4) * NUM_METRICS[task]
        assert all(f"<td>{cell}</td>" in text for line in lines for cell in line)
        assert not any("nan" in cell for line in lines for cell in line)

    def test_models_and_full_layers_have_sections_of_their_own(self, tmp_path):
        rows = [*made_up("ruler"), *made_up("ruler", model="other"), *made_up("ruler", full_layers=[])]
        rows += [row for heads in ("7:0,2", "7:0 12:1") for row in made_up("ruler", full_layers=[], full_heads=heads)]
        text = write_report(rows, tmp_path).read_text()
        assert text.count("<h2>") == len(list(tmp_path.glob("*.png"))) == 5
        assert "<h2>ruler: tiny, full layers none</h2>" in text
        assert "<h2>ruler: tiny, full layers none, full heads 7:0 12:1</h2>" in text
        assert len(list(tmp_path.glob("ruler-tiny-none-2-heads-????????-score.png"))) == 2

    def test_later_rows_replace_earlier_ones(self, tmp_path):
        old, new = made_up("passkey", score=0.0, num_samples=2), made_up("passkey", score=1.0, num_samples=2)
        again = write_report([*old, *new], tmp_path).read_text()
        assert again == write_report(new, tmp_path).read_text()
        assert "1.00 (0.68 to 1.00, n=8)" in again
        assert "0.00 (" not in again

    def test_cells_are_those_of_their_variant(self):
        rows = made_up("needle", score=1.0)
        for row in rows:
            if (row["scorer"], row["protect_first"], row["keep_ratio"]) == ("l2", 4, 0.25):
                row["exact"] = 0.0
        hit, miss = "1.00 (0.81 to 1.00, n=16)", "0.00 (0.00 to 0.19, n=16)"
        assert cells_of(rows, "needle", "l2 +4/64", "exact") == ["", hit, miss]
        assert (
            cells_of(rows, "needle", "l2", "exact") == cells_of(rows, "needle", "l2 +4/64", "score") == ["", hit, hit]
        )
        assert cells_of(rows, "needle", "no compression", "exact") == [hit, "", ""]

    def test_memory_of_the_whole_cache_is_shown_beside_the_ratio(self, tmp_path):
        rows = [{**row, "memory": 0.1 + 0.9 * row["keep_ratio"]} for row in made_up("passkey")]
        line = ["memory of the whole cache", "", "1.00", "0.55", "0.33"]
        assert table(aggregates(rows), "passkey")[1] == line
        assert "memory of the whole cache  0.55  0.33" in re.sub(" {2,}", "  ", summary(rows))
        # Older rows do not have it; with one of them it is unknown.
        del rows[1]["memory"]
        assert line[0] not in summary(rows)

    def test_questions_that_were_hidden_are_variants_of_their_own(self):
        seen = [{**row, "question": "seen"} for row in made_up("passkey", score=1.0)]
        hidden = [{**row, "question": "hidden", "score": 0.0} for row in seen if row["keep_ratio"] < 1]
        cells = aggregates([*seen, *hidden])
        (line,) = [line for line in matrix(cells, "passkey", "score") if line.startswith("l2 +4/64 hidden ")]
        assert line.count("0.00 (0.00 to 0.19)") == 2
        (line,) = [line for line in matrix(cells, "passkey", "score") if line.startswith("l2 +4/64  ")]
        assert line.count("1.00 (0.81 to 1.00)") == 2

    def test_excess_loss_is_over_no_compression(self):
        rows = made_up("perplexity") + [
            {**row, "loss": row["loss"] + 7} for row in made_up("perplexity", full_layers=[2])
        ]
        found = with_excess_loss([*rows, *made_up("ruler")])
        for row in found[: len(rows)]:
            assert row["excess loss"] == pytest.approx(1 - row["keep_ratio"], abs=1e-9)
        assert all(row["excess loss"] == 0 for row in found[: len(rows)] if row["keep_ratio"] == 1)
        assert found[len(rows) :] == made_up("ruler")

    def test_names_are_escaped(self, tmp_path):
        text = write_report(made_up("passkey", model="<b>"), tmp_path).read_text()
        assert "&lt;b&gt;" in text
        assert "<b>" not in text
        assert "<i>" not in text

    @pytest.mark.parametrize(("score", "num_samples"), [(0.0, 3), (1.0, 4)])
    def test_scores_that_agree(self, tmp_path, score, num_samples):
        write_report(made_up("passkey", lengths=[100], depths=[0], score=score, num_samples=num_samples), tmp_path)

    @pytest.mark.parametrize("task", ["perplexity", "needle"])
    def test_one_sample(self, tmp_path, task):
        write_report(made_up(task, lengths=[100], depths=[0], num_samples=1), tmp_path)

    def test_controls_alone(self, tmp_path):
        write_report(made_up("needle", scorers=["random"]), tmp_path)

    @pytest.mark.parametrize("task", ["perplexity", "needle"])
    def test_no_compression_alone(self, tmp_path, task):
        write_report(made_up(task, ratios=[]), tmp_path)

    @pytest.mark.parametrize("second", [{"lengths": [300], "depths": [1]}, {"lengths": [300], "ratios": [0.1]}])
    def test_runs_with_other_options_together(self, tmp_path, second):
        write_report([*made_up("needle"), *made_up("needle", **second)], tmp_path)

    @pytest.mark.parametrize("task", NUM_PLOTS)
    def test_budgets_beside_ratios(self, tmp_path, task):
        rows = made_up(task, budgets=(80, 96))
        text = html.unescape(write_report(rows, tmp_path).read_text())
        assert text.count("<img ") == text.count("<figcaption>") == NUM_PLOTS[task] + NUM_METRICS[task]
        heading, *lines = table(aggregates(rows), task)
        assert heading[2:] == ["keep 1", "keep 0.5", "keep 0.25", "budget 96+16", "budget 80+16"]
        # No compression; l2 and two controls at every amount, random at ratios; each with and without protection.
        cells = [cell for line in lines for cell in line[2:]]
        assert sum(cell != "" for cell in cells) == (1 + 2 * (4 * 2 + 3 * 2)) * NUM_METRICS[task]
        assert all(f"<td>{cell}</td>" in text for cell in cells)
        assert "to B rows when a head holds B+I; before the end of the prompt when it holds B+2048." in text

    def test_budgets_alone(self, tmp_path):
        rows = made_up("copy", ratios=(), budgets=(96,), lengths=[100], num_samples=1)
        assert "budget 96+16" in write_report(rows, tmp_path).read_text()
        assert matrix(aggregates(rows), "copy", "score")[1].split() == ["budget", "96+16"]

    @pytest.mark.parametrize("task", NUM_PLOTS)
    def test_a_sentence_under_each_figure(self, tmp_path, task):
        text = html.unescape(write_report(made_up(task), tmp_path).read_text())
        assert text.count("<figcaption>") == text.count("<img ") == NUM_PLOTS[task]
        assert (CAPTIONS["positions"] in text) == (task == "perplexity")
        assert (CAPTIONS["depths"] in text) == (task in ("passkey", "needle"))
        assert "{" not in "".join(part.split("</figcaption>")[0] for part in text.split("<figcaption>")[1:])

    def test_conditions_are_named(self, tmp_path):
        rows = made_up("perplexity", text="moby_dick", seed=7, continued=64)
        text = conditions(aggregates(rows))
        assert text == (
            "8 prompts of 100 and 200 tokens, text moby_dick, seed 7, continued 64 tokens. "
            "Protected tokens: 0 first and 0 last; 4 first and 64 last."
        )
        assert text in write_report(rows, tmp_path).read_text()
        assert "tiny, full layers 0, 1" in summary(rows)

    def test_rows_of_older_runs_lack_some_conditions(self):
        assert conditions(aggregates(made_up("ruler", ratios=[]))) == (
            "16 prompts of 100 and 200 tokens. Protected tokens: none, nothing was compressed."
        )


class TestSummary:
    def test_variants_by_ratio_with_intervals_and_the_baseline(self):
        rows = made_up("passkey", score=1.0)
        for row in rows:
            if (row["scorer"], row["protect_first"], row["keep_ratio"]) == ("l2", 4, 0.25):
                row["score"] = 0.0
        baseline, heading, *lines = matrix(aggregates(rows), "passkey", "score")
        assert baseline == "score without compression: 1.00 (0.81 to 1.00)"
        assert heading.split() == ["keep", "0.5", "keep", "0.25"]
        assert len(lines) == 2 * 4
        (line,) = [line for line in lines if line.startswith("l2 +4/64 ")]
        assert line.split("  ")[-2:] == ["1.00 (0.81 to 1.00)", "0.00 (0.00 to 0.19)"]
        assert len({len(line) for line in [heading, *lines]}) == 1

    def test_nothing_gained_has_no_sign(self):
        rows = [{**row, "loss": row["loss"] if row["keep_ratio"] == 1 else 2.149} for row in made_up("perplexity")]
        rows = [{**row, "loss": 2.15 if row["keep_ratio"] == 1 else row["loss"]} for row in rows]
        assert "-0.00" not in summary(rows)

    def test_losses_are_shown_beside_the_loss_itself(self):
        (baseline, *_) = matrix(aggregates(made_up("perplexity")), "perplexity", "excess loss")
        assert baseline.startswith("loss without compression: 2.15 (")

    @pytest.mark.parametrize("task", NUM_METRICS)
    def test_every_metric_has_a_table(self, task):
        text = summary(made_up(task))
        assert text.count("without compression: ") == text.count("; means with 95 % intervals") == NUM_METRICS[task]
        assert "nan" not in text
        assert max(map(len, text.splitlines())) <= 160

    @pytest.mark.parametrize("task", NUM_METRICS)
    def test_one_prompt_has_no_interval(self, task):
        text = summary(made_up(task, lengths=[100], depths=[0], num_samples=1))
        assert "nan" not in text

    def test_without_compression_there_is_the_baseline_alone(self):
        assert matrix(aggregates(made_up("passkey", ratios=[], score=1.0)), "passkey", "score") == [
            "score without compression: 1.00 (0.81 to 1.00)"
        ]
