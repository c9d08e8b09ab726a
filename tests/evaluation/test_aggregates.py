"""Aggregates have the numbers of the rows, and the published tables are made from the committed aggregates."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up import made_up

from vllm_l2kv.profile import Profile, Rope, Shape, Target
from vllm_l2kv.tools.evaluation import cli
from vllm_l2kv.tools.evaluation.aggregates import METRICS, aggregates
from vllm_l2kv.tools.evaluation.report import conditions, summary, write_report
from vllm_l2kv.tools.evaluation.rows import read_rows

ROOT = Path(__file__).parents[2]
WHERE = {"device": "NVIDIA H100", "dtype": "bfloat16", "vllm": "0.32.0", "commit": "abc"}


def kept(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Returns aggregates as read from a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in aggregates(rows)))
    return read_rows(path)


def cell_of(rows: list[dict[str, Any]], keep_ratio: float, **about: Any) -> dict[str, Any]:
    about = {"scorer": "l2", "protect_first": 0, "length": 100, "keep_ratio": keep_ratio, **about}
    (cell,) = (cell for cell in aggregates(rows) if about.items() <= cell.items())
    return cell


@pytest.mark.parametrize("task", METRICS)
def test_aggregates_make_the_same_report_as_rows(tmp_path, task):
    rows = made_up(task, text="moby_dick", seed=7, **WHERE)
    cells = kept(rows, tmp_path / "aggregates.jsonl")
    # Two lengths, each without compression, and with two protections for l2 and three controls at two ratios.
    assert len(cells) == 2 * (1 + 2 * 4 * 2)
    assert summary(cells) == summary(rows)
    page, again = (write_report(given, tmp_path).read_text() for given in (rows, cells))
    assert re.findall("<td>.*?</td>|<h2>.*?</h2>", again) == re.findall("<td>.*?</td>|<h2>.*?</h2>", page)
    # Plots by position and by depth need answers.
    assert again.count("<img ") == len(METRICS[task])


def test_an_aggregate_has_number_mean_and_deviation():
    cell = cell_of(made_up("passkey"), 0.25)
    assert cell["num_samples"] == 8
    assert cell["score"] == pytest.approx({"mean": 0.5, "deviation": (8 * 0.25 / 7) ** 0.5})
    assert not {"sample", "depth", "answer"} & set(cell)


def test_budgets_are_amounts_of_their_own():
    """They are different from the whole cache, which has their ratio, and from each other."""
    rows = made_up("copy", budgets=(80, 96))
    for row in rows:
        row["score"] = {80: 0.25, 96: 0.75}.get(row["max_tokens"], 1.0)
    for budget, score in ((80, 0.25), (96, 0.75), (None, 1.0)):
        assert cell_of(rows, 1.0, scorer="l2", max_tokens=budget)["score"]["mean"] == score
    other = [{**row, "answer_interval": 64} for row in rows if row["max_tokens"] == 80]
    assert len(aggregates([*rows, *other])) == len(aggregates(rows)) + len(aggregates(other))


def test_excess_is_counted_by_prompt():
    cell = cell_of(made_up("perplexity"), 0.25)
    assert cell["excess loss"] == pytest.approx({"mean": 0.75, "deviation": 0}, abs=1e-9)
    assert cell["loss"]["deviation"] > 0.1


def test_answers_replace_the_aggregate_that_was_made_of_such(tmp_path):
    old, other, new = (made_up("passkey", **about) for about in ({"score": 0.0}, {"seed": 8}, {"score": 1.0}))
    cells = kept([*old, *other], tmp_path / "aggregates.jsonl")
    assert aggregates([*cells, *new]) == aggregates([*new, *cells]) == [*aggregates(new), *aggregates(other)]


def test_where_answers_come_from():
    rows = made_up("ruler", num_samples=1, **WHERE)
    rows += [{**row, "sample": 1, "commit": "def"} for row in rows]
    assert {cell["commit"] for cell in aggregates(rows)} == {"abc, def"}
    assert "on NVIDIA H100, bfloat16, vLLM 0.32.0, commit abc, def." in conditions(aggregates(rows))


class TestRefused:
    def line(self, capsys, tmp_path, rows) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(SystemExit) as caught:
            cli.evaluate(["report", str(path), "--out", str(tmp_path / "out")])
        assert caught.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    def test_losses_without_that_of_the_whole_cache(self, capsys, tmp_path):
        rows = [row for row in made_up("perplexity") if (row["keep_ratio"], row["length"]) != (1, 200)]
        line = self.line(capsys, tmp_path, rows)
        prompt = "model tiny, full_layers [0, 1], length 200, sample 0"
        assert f"there is no row without compression for the prompt of {prompt}" in line

    @pytest.mark.parametrize("row", [{"layer": 0, "head": 1}, {"task": "bench"}])
    def test_rows_of_something_else(self, capsys, tmp_path, row):
        tasks = "perplexity, passkey, needle, ruler, copy, chat"
        said = f"task of a row is {row.get('task')!r}; `vllm-l2kv eval` writes {tasks}."
        assert self.line(capsys, tmp_path, [row]).endswith(f"argument ROWS: {said}")
        # Before an engine starts and adds to them.
        with pytest.raises(SystemExit):
            cli.evaluate(["passkey", "model", "--out", str(tmp_path)])
        assert capsys.readouterr().err.splitlines()[-1].endswith(f"argument --out: {said}")


@pytest.fixture
def quality(monkeypatch):
    """The module that measures the numbers of docs/quality.md."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.quality import cells, pooled, settings, tables

    return SimpleNamespace(cells=cells, pooled=pooled, settings=settings, tables=tables)


class TestCells:
    """Cells from rows of two engines, with full layers {0, 1} and {1}; the first one measured the whole cache."""

    def settings(self, quality):
        return [
            quality.settings.Setting(quality.settings.WHOLE, 1.0, (0, 1), 1.0, "l2"),
            quality.settings.Setting("equal-l2", 0.75, (0, 1), 0.5, "l2"),
            quality.settings.Setting("profile-l2", 0.5, (1,), 0.5, "l2"),
        ]

    def rows(self, task: str):
        made = made_up(task, ratios=(0.5,), lengths=(100,), memory=0.6, question="seen", **WHERE)
        chosen = [row for row in made if row["scorer"] == "l2" and (row["protect_first"] or row["keep_ratio"] == 1)]
        second = [{**row, "full_layers": [1]} for row in chosen if row["keep_ratio"] < 1]
        for row in second:
            row |= {"loss": row["loss"] + 1} if "loss" in row else {"score": 1 - row["score"]}
        return chosen + second

    def test_scores_belong_to_settings_in_the_order_of_prompts(self, quality):
        rows = self.rows("passkey")
        found = quality.cells.cells(self.settings(quality), rows)
        assert [cell["method"] for cell in found] == ["whole cache", "equal-l2", "profile-l2"]
        assert [cell["scores"] for cell in found] == [[0, 1] * 4, [0, 1] * 4, [1, 0] * 4]
        assert {cell["held"] for cell in found} == {0.6}
        assert quality.cells.cells(self.settings(quality), rows[::-1]) == found

    def test_engines_with_different_full_heads_have_separate_cells(self, quality):
        settings = [
            *self.settings(quality)[:2],
            quality.settings.Setting("heads-l2", 0.5, (), 0.5, "l2", "7:0,2"),
            quality.settings.Setting("heads-l2", 0.25, (), 0.5, "l2", "7:0"),
        ]
        rows = self.rows("perplexity")
        second = [row for row in rows if row["full_layers"] == [1]]
        third = [{**row, "full_layers": [], "full_heads": "7:0,2"} for row in second]
        fourth = [{**row, "loss": row["loss"] + 1, "full_heads": "7:0"} for row in third]
        found = quality.cells.cells(settings, [*rows, *third, *fourth])
        assert [cell.get("full_heads") for cell in found] == ["", "", "7:0,2", "7:0"]
        assert [round(cell["scores"][0], 3) for cell in found] == [2, 0.5, 1.5, 2.5]

    def test_two_methods_may_be_one_setting_which_counts_once(self, quality):
        settings = self.settings(quality)
        found = quality.cells.cells([*settings, replace(settings[2], method="equal-l2")], self.rows("passkey"))
        assert [cell["scores"] for cell in found[2:]] == [[1, 0] * 4] * 2
        said = quality.tables.num_settings(found)
        assert said.startswith("2 settings were compared in 1 tasks at 1 lengths, by 24 answers;")

    def test_losses_are_counted_from_the_whole_cache_of_another_engine(self, quality):
        whole, equal, profile = quality.cells.cells(self.settings(quality), self.rows("perplexity"))
        assert whole["scores"][:2] == [2.0, 2.1]
        assert equal["scores"] == pytest.approx([0.5] * len(whole["scores"]))
        assert profile["scores"] == pytest.approx([1.5] * len(whole["scores"]))

    def test_a_grid_that_was_cut_off_is_refused(self, quality):
        with pytest.raises(ValueError, match=r"passkey at 100 tokens: cells have \[7, 8\] prompts"):
            quality.cells.cells(self.settings(quality), self.rows("passkey")[:-1])


class TestPooled:
    def scores(self, *means: float, n: int = 40):
        tasks = ("needle", "passkey", "ruler")
        return {task: [float(i < mean * n) for i in range(n)] for task, mean in zip(tasks, means, strict=True)}

    def test_every_task_counts_the_same(self, quality):
        scores = self.scores(1, 0.5, 0.25)
        scores["passkey"] *= 9
        assert quality.pooled.pooled(scores).value == pytest.approx((1 + 0.5 + 0.25) / 3)

    def test_the_interval_is_that_of_the_normal_distribution(self, quality):
        found = quality.pooled.pooled(self.scores(0.5, 0.5, 0.5, n=400))
        half = 1.96 * (0.25 / 400 / 3) ** 0.5
        assert found == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=0.003)

    def test_differences_are_paired(self, quality):
        """Two settings that fail at the same prompts have a difference of 0, however few prompts there are."""
        scores = self.scores(0.5, 0.25, 0.75)
        assert quality.pooled.difference(scores, scores) == (0, 0, 0)
        turned = {task: values[::-1] for task, values in scores.items()}
        low, high = quality.pooled.difference(scores, turned)[1:]
        assert low < -0.05 < 0.05 < high

    def test_all_three_tasks_are_needed(self, quality):
        cells = [{"task": task, "scores": values} for task, values in self.scores(1, 1, 1).items()]
        assert quality.pooled.retrieval(cells) == self.scores(1, 1, 1)
        assert quality.pooled.retrieval(cells[:2]) is None


def test_results_over_http(quality):
    """Losses are those of the pooled score, in which every task counts the same."""
    from benchmarks.quality.over_http import Asked, results

    scores = {"needle": [1.0, 1.0], "passkey": [1.0], "ruler": [0.5]}
    whole = {task: [Asked(score, 1.0) for score in of_task] for task, of_task in scores.items()}
    hidden = whole | {"needle": [Asked(0.4, 0.25), Asked(0.6, 0.35)]}
    found = results({quality.settings.WHOLE: whole, "seen": whole, "hidden": hidden})
    assert found["num_prompts"] == 4
    assert found["scores"]["hidden"] == {"needle": 0.5, "passkey": 1.0, "ruler": 0.5}
    assert found["seen"]["difference"][0] == 0
    assert found["hidden"]["difference"][0] == pytest.approx(-0.5 / 3, abs=1e-3)
    assert found["hidden"]["memory"] == pytest.approx((0.25 + 0.35 + 1 + 1) / 4)


def test_settings_take_their_nominal_memory(quality):
    """Memory of the whole cache follows from full layers and the ratio of the others, with and without a profile."""
    shape = Shape(6, 1, 64, ("sliding_attention", *["full_attention"] * 5))
    targets = Target(0.5, (3,), 0.375, "l2"), Target(0.5, (), 0.375, "l2", {2: (0,)})
    profile = Profile("tiny", "0" * 96, shape, Rope(64, False), (3, 1, 2, 4, 5), targets)
    whole, *found = quality.settings.settings(profile, quality.settings.METHODS, [0.75, 0.5])
    assert (whole.keep_ratio, whole.full_layers) == (1, (1,))
    assert len(found) == 2 * len(quality.settings.METHODS)
    for setting in found:
        full = {"equal": ((1,), ""), "profile": ((3,), ""), "heads": ((), "2:0")}
        assert setting.full == full[setting.method.partition("-")[0]]
        assert (1 + 4 * setting.keep_ratio) / 5 == pytest.approx(setting.memory, abs=1e-5)
        assert setting.params.scorer in setting.method
    others = replace(profile, memory=(*targets, Target(0.5, (4,), 0.375, "learned")))
    for setting in quality.settings.settings(others, ["profile-l2", "profile-learned", "profile-random"], [0.5])[1:]:
        assert setting.full_layers == ((4,) if setting.scorer == "learned" else (3,))
    layers = replace(profile, memory=targets[:1])
    without = quality.settings.settings(layers, quality.settings.METHODS, [0.75, 0.5])
    assert without == [whole, *(setting for setting in found if not setting.method.startswith("heads"))]


@pytest.mark.parametrize("page", ["quality_tables", "quality"])
def test_the_published_tables_are_made_of_the_committed_results(monkeypatch, page):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.quality.tables import DOCUMENTS, with_tables

    text = DOCUMENTS[page].read_text()
    assert with_tables(page, text) == text
    torn = re.sub(r"(<!-- \w+: benchmarks/quality/tables.py -->\n).*?(<!-- end of)", r"\1\2", text, flags=re.DOTALL)
    assert with_tables(page, torn) == text != torn
