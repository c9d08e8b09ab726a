"""Options of `vllm-l2kv eval`, and its results with a fake engine."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
from weights import made_up_weights, write_profile

from vllm_l2kv.params import SCORERS, CompressionParams
from vllm_l2kv.policy import Intervals
from vllm_l2kv.profile import Target
from vllm_l2kv.settings import FullHeads
from vllm_l2kv.tools.evaluation import cli, run
from vllm_l2kv.tools.evaluation.cases import Answer, Case
from vllm_l2kv.tools.evaluation.rows import about_heads
from vllm_l2kv.tools.evaluation.tasks.ruler import TASKS as SUBTASKS
from vllm_l2kv.tools.progress import Progress


class Mute:
    """An engine with empty answers and a loss of 1 for each token."""

    tokenizer: Any = None

    def __init__(
        self,
        model: str,
        full_layers: Sequence[int],
        intervals: Intervals,
        profile: str | None,
        full_heads: FullHeads,
        scorers: Sequence[str],
        max_model_len: int,
    ) -> None:
        self.about = {"model": Path(model).name, "full_layers": full_layers, **about_heads(full_heads)}
        self.intervals = {f"{name}_interval": rows for name, rows in intervals._asdict().items()}
        self.max_tokens = max_model_len

    def rows(
        self,
        task: str,
        cases: Iterable[Case],
        compared: Sequence[CompressionParams],
        progress: Progress,
        questions: Sequence[str],
    ) -> Iterator[dict[str, Any]]:
        progress.begin(task)
        for case, variant, question in product(cases, compared, questions):
            fields = {name.removeprefix("kv_"): value for name, value in variant.as_fields().items()}
            fields |= {"question": question} | ({} if variant.max_tokens is None else self.intervals)
            answer = Answer("", (1.0,) * case.num_tokens, (True,) * case.num_tokens)
            yield {"task": task, **self.about, **fields, **case.about, **case.score(answer)}


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    monkeypatch.setattr(run, "Engine", lambda *arguments, **options: pytest.fail("too late"))


@pytest.fixture
def mute(monkeypatch, tokenizer):
    monkeypatch.setattr(Mute, "tokenizer", tokenizer)
    monkeypatch.setattr(run, "Engine", Mute)


def refused(capsys, *words: str) -> str:
    """Returns the last line on standard error."""
    with pytest.raises(SystemExit) as caught:
        cli.evaluate(words)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("task", "words", "bound"),
    [
        ("passkey", ["--ratios", "0.5,0"], "0 < R <= 1, got 0"),
        ("passkey", ["--ratios", "2"], "0 < R <= 1, got 2"),
        ("passkey", ["--ratios", "nan"], "0 < R <= 1, got nan"),
        ("copy", ["--budgets", "256,0"], "1 <= N <= 2147483647, got 0"),
        ("copy", ["--answer-interval", "0"], "1 <= N <= 2147483647, got 0"),
        ("passkey", ["--scorers", "l2,l3"], f"'l3' is not one of {', '.join(SCORERS)}"),
        ("passkey", ["--scorers", "./mine.py:Recent"], "'./mine.py:Recent' is not one of l2"),
        ("passkey", ["--granularities", "page"], "'page' is not one of token, neighbors, block"),
        ("passkey", ["--depths", "1.5"], "0 <= D <= 1, got 1.5"),
        ("needle", ["--depths=-0.5"], "0 <= D <= 1, got -0.5"),
        ("passkey", ["--samples", "0"], "1 <= N <= 2147483647, got 0"),
        ("passkey", ["--samples", "-1"], "1 <= N"),
        ("passkey", ["--seed", "-1"], "0 <= N"),
        ("passkey", ["--lengths", "100,0"], "1 <= N <= 2147483647, got 0"),
        ("passkey", ["--lengths", ""], "at least one"),
        ("passkey", ["--depths", ""], "at least one"),
        ("passkey", ["--max-model-len", "0"], "1 <= N <= 2147483647, got 0"),
        ("chat", ["--memory", "0.5,0"], "0 < M <= 1, got 0"),
        ("chat", ["--questions", "seen,heard"], "'heard' is not one of seen, hidden"),
        ("passkey", ["--protect", "4"], "FIRST:LAST, such as 4:64, got '4'"),
        ("passkey", ["--protect", "4:-1"], "0 <= N"),
        ("passkey", ["--full-layers=-1"], "layer indices >= 0"),
        ("perplexity", ["--continued", "0"], "1 <= N <= 2147483647, got 0"),
        ("ruler", ["--subtasks", "vt,qa_1"], "'qa_1' is not one of niah_single_1"),
    ],
)
def test_bad_options_are_named_with_their_bound(capsys, task, words, bound):
    line = refused(capsys, task, "model", *words)
    assert line.startswith(f"vllm-l2kv eval {task}: error: argument {words[0].split('=')[0]}: ")
    assert bound in line


def test_one_line_is_said(capsys):
    with pytest.raises(SystemExit):
        cli.evaluate(["passkey", "model", "--ratios", "2"])
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["passkey", "model", "--text", "moby_dick"],
        ["copy", "model", "--text", "moby_dick"],
        ["copy", "model", "--depths", "0"],
        ["ruler", "model", "--depths", "0"],
        ["quality", "model"],
    ],
)
def test_options_of_other_tasks_are_unknown(capsys, words):
    assert "error: " in refused(capsys, *words)


@pytest.mark.parametrize("task", cli.TASKS)
def test_defaults(task):
    options = cli._eval_parser().parse_args([task, "model"])
    cli.take_profile(options)
    assert (options.model, options.out) == ("model", Path("eval") / task)
    assert (options.full_layers, options.ratios) == ((0, 1), (0.75, 0.5, 0.25, 0.1))
    assert (options.budgets, options.prompt_interval, options.answer_interval) == ([], *Intervals())
    assert (options.scorers, options.granularities, options.protect) == (["l2"], ["token"], [(4, 64)])
    assert (options.lengths, options.samples, options.seed, options.max_model_len) == ([1024], 10, 0, None)
    assert (options.memory, options.questions) == (None, ["seen"])
    own = {
        "perplexity": {"text": "moby_dick", "continued": 128},
        "passkey": {"depths": [0, 0.25, 0.5, 0.75, 1]},
        "needle": {"text": "state_of_the_union", "depths": [0, 0.25, 0.5, 0.75, 1]},
        "ruler": {"text": "state_of_the_union", "subtasks": list(SUBTASKS)},
        "chat": {"text": "moby_dick"},
    }
    assert vars(options).items() >= own.get(task, {}).items()


def test_lists():
    words = ["--full-layers", "", "--protect", "0:0, 4:64", "--ratios", "0.5,0.25"]
    options = cli._eval_parser().parse_args(["passkey", "model", *words])
    assert (options.full_layers, options.protect, options.ratios) == ((), [(0, 0), (4, 64)], [0.5, 0.25])


@pytest.mark.parametrize("task", [*cli.TASKS, "report"])
def test_help(capsys, task):
    with pytest.raises(SystemExit) as caught:
        cli.evaluate([task, "--help"])
    assert caught.value.code == 0
    assert f"vllm-l2kv eval {task}" in capsys.readouterr().out


@pytest.mark.usefixtures("mute")
@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("perplexity", []),
        ("copy", []),
        ("needle", ["--depths", "0"]),
        ("ruler", ["--subtasks", "niah_single_1"]),
    ],
)
def test_rows_are_added_and_reported(capsys, tmp_path, task, words):
    command = [task, "model", "--lengths", "400", "--samples", "2", "--ratios", "0.5", "--out", str(tmp_path), *words]
    cli.evaluate(command)
    report = (tmp_path / "report.html").read_text()
    captured = capsys.readouterr()
    *_, last = captured.out.splitlines()
    assert last == str(tmp_path / "report.html")
    assert f"{task}: model, full layers 0, 1\n2 prompts of 400 tokens, " in captured.out
    assert ", seed 0" in captured.out
    assert "Protected tokens: 4 first and 64 last." in captured.out
    assert "without compression: " in captured.out
    for variant in ("l2 +4/64", "random +4/64", "l2_high +4/64", "first_last +4/64"):
        assert f"\n{variant} " in captured.out
    assert captured.err == f"Log: {tmp_path / 'vllm.log'} (--verbose prints it here instead)\n"
    cli.evaluate(command)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    # Two samples, each without compression, by l2 and by three controls.
    assert len(rows) == 2 * (2 * 5)
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]
    assert (tmp_path / "report.html").read_text() == report


@pytest.mark.usefixtures("mute")
def test_a_scorer_of_a_user_is_reported_by_its_name(capsys, tmp_path):
    words = ["--lengths", "400", "--samples", "2", "--scorers", "mine:Recent,l2", "--out", str(tmp_path)]
    cli.evaluate(["passkey", "model", *words])
    assert "\nmine:Recent +4/64 " in capsys.readouterr().out
    assert "mine:Recent" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("mute")
def test_budgets_are_measured_beside_ratios(capsys, tmp_path):
    words = ["--lengths", "400", "--samples", "2", "--ratios", "0.5", "--budgets", "200,100", "--answer-interval", "16"]
    cli.evaluate(["copy", "model", *words, "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    # Without compression, by l2 and three controls at a ratio, by l2 and two controls at two budgets.
    assert len(rows) == 2 * (1 + 4 + 3 * 2)
    assert {row["answer_interval"] for row in rows if row["max_tokens"]} == {16}
    assert not any("answer_interval" in row for row in rows if not row["max_tokens"])
    out = capsys.readouterr().out
    assert "keep 0.5" in out
    assert out.index("budget 200+16") < out.index("budget 100+16")
    assert "before the end of the prompt when it holds B+2048." in out


def test_the_learned_scorer_needs_a_profile(capsys):
    """Otherwise the engine would refuse each request, and each answer would count as wrong."""
    line = refused(capsys, "passkey", "model", "--scorers", "l2,learned")
    assert "argument --scorers: learned needs the weights of a profile; give --kv-profile FILE." in line


def with_profile(*words: str) -> tuple[Sequence[int], Sequence[float] | None, list[str]]:
    options = cli._eval_parser().parse_args(["passkey", "model", "--kv-profile", *words])
    cli.take_profile(options)
    return options.full_layers, options.ratios, [*options.scorers, *options.granularities]


def test_a_profile_sets_what_is_not_given(capsys, tmp_path):
    path = str(tmp_path / "p.safetensors")
    memory = (Target(0.5, (2, 7), 0.375, "keydiff"), Target(0.25, (2,), 0.166667, "learned", {}, "neighbors"))
    write_profile(path, made_up_weights(10, 2, 32), memory=memory)
    assert with_profile(path) == ((2, 7), [0.375], ["keydiff", "token"])
    assert with_profile(path, "--kv-memory", "0.25") == ((2,), [0.166667], ["learned", "neighbors"])
    both = with_profile(path, "--kv-memory", "0.25", "--granularities", "token,block")
    assert both == ((2,), [0.166667], ["learned", "token", "block"])
    assert with_profile(path, "--kv-memory", "0.25", "--scorers", "learned")[2] == ["learned", "neighbors"]
    assert with_profile(path, "--kv-memory", "0.25", "--scorers", "learned,l2")[2] == ["learned", "l2", "token"]
    assert with_profile(path, "--full-layers", "0", "--scorers", "l2") == ((0,), [0.444444], ["l2", "token"])
    assert with_profile(path, "--ratios", "0.5,0.1") == ((2, 7), [0.5, 0.1], ["keydiff", "token"])
    assert with_profile(path, "--memory", "0.5,0.25") == ((2, 7), None, ["keydiff", "token"])
    line = refused(capsys, "passkey", "model", "--kv-profile", path, "--kv-memory", "0.1")
    assert "argument --kv-profile: memory must be more than 0.100, which the 1 full layers" in line
    assert "give its file too" in refused(capsys, "passkey", "model", "--kv-memory", "0.5")


def test_a_single_scorer_takes_what_was_best_with_it(tmp_path):
    """Several scorers share the recommended layers."""
    path = str(tmp_path / "p.safetensors")
    memory = (Target(0.5, (2, 7), 0.375, "keydiff"), Target(0.5, (4,), 0.444444, "l2"))
    write_profile(path, made_up_weights(10, 2, 32), memory=memory)
    assert with_profile(path, "--scorers", "l2") == ((4,), [0.444444], ["l2", "token"])
    assert with_profile(path, "--scorers", "l2,keydiff") == ((2, 7), [0.375], ["l2", "keydiff", "token"])
    assert with_profile(path) == with_profile(path, "--scorers", "keydiff") == ((2, 7), [0.375], ["keydiff", "token"])


def test_a_profile_sets_heads(capsys, tmp_path):
    memory = (Target(0.5, (2, 7), 0.375, "keydiff"), Target(0.5, (), 0.411765, "l2", {2: (0, 1), 7: (1,)}))
    write_profile(tmp_path / "p", made_up_weights(10, 2, 32), memory=memory)
    words = ["passkey", "model", "--kv-profile", str(tmp_path / "p"), "--kv-classes", "heads"]
    options = cli._eval_parser().parse_args(words)
    cli.take_profile(options)
    assert (options.full_layers, options.full_heads, options.ratios) == ((), {2: (0, 1), 7: (1,)}, [0.411765])
    assert "leave them out" in refused(capsys, *words, "--full-heads", "2:0")


def test_memory_counts_heads(tmp_path, tiny_model, mute):
    """One layer and one head are full, of 4 layers with 2 heads each."""
    words = ["--memory", "0.75", "--full-layers", "1", "--full-heads", "0:1", "1:0", "--samples", "1"]
    cli.evaluate(["chat", str(tiny_model("llama")), *words, "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["keep_ratio"] for row in rows} == {1, 0.6}
    assert {row["full_heads"] for row in rows} == {"0:1 1:0"}
    assert "full layers 1, full heads 0:1 1:0</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("mute")
def test_memory_of_the_whole_cache_in_place_of_ratios(tmp_path, tiny_model):
    """One of four layers is full, so the others keep two thirds for three quarters of the memory."""
    words = ["--memory", "0.75,0.6", "--full-layers", "1", "--questions", "seen,hidden", "--samples", "1"]
    cli.evaluate(["chat", str(tiny_model("llama")), *words, "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["keep_ratio"] for row in rows} == {1, 0.666667, 0.466667}
    assert {row["question"] for row in rows} == {"seen", "hidden"}


def test_a_memory_beside_ratios_or_below_that_of_full_layers_is_refused(capsys, tiny_model):
    line = refused(capsys, "chat", "model", "--ratios", "0.5", "--memory", "0.5")
    assert line.endswith("argument --memory: not allowed with argument --ratios")
    line = refused(capsys, "chat", str(tiny_model("llama")), "--full-layers", "0", "--memory", "0.5,0.25")
    assert line.endswith("argument --memory: M must be more than 0.250, the share of full layers and heads, got 0.25.")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budgets", "67"], "kv_max_tokens must be at least kv_protect_first + kv_protect_last = 68, got 67"),
        (["--budgets", "100", "--scorers", "l2,lagkv"], "kv_scorer 'lagkv' is defined for a single compaction"),
        (["--budgets", "100", "--granularities", "block"], "kv_granularity 'block' is defined for a single compaction"),
    ],
)
def test_variants_that_a_budget_excludes_are_refused(capsys, tmp_path, words, said):
    line = refused(capsys, "copy", "model", *words, "--out", str(tmp_path))
    assert f"argument --budgets: {said}" in line


@pytest.mark.usefixtures("mute")
def test_the_engine_is_as_long_as_needed(tmp_path):
    words = ["--lengths", "400", "--samples", "2", "--continued", "300", "--ratios", "0.5", "--out", str(tmp_path)]
    cli.evaluate(["perplexity", "model", *words])
    assert (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("mute")
def test_a_context_too_short_is_refused_before_the_engine_starts(capsys, tmp_path):
    out = tmp_path / "out"
    line = refused(capsys, "passkey", "model", "--max-model-len", "200", "--out", str(out))
    assert line.endswith(", the tokens of the longest prompt, got 200.")
    assert not (out / "rows.jsonl").exists()


COMMAND = ["passkey", "model", "--lengths", "400", "--samples", "2", "--ratios", "0.5", "--depths", "0"]


@pytest.mark.usefixtures("mute")
def test_progress_is_shown_during_the_run(capfd, tmp_path):
    """From the start of the command on, and as lines if standard error is not a terminal."""
    cli.evaluate([*COMMAND, "--out", str(tmp_path)])
    assert capfd.readouterr().err.splitlines()[1:4] == [
        "starting the engine with model, 0 s",
        "making prompts for passkey, 0 s",
        "passkey, 0 s",
    ]


class Talking(Mute):
    """An engine that prints as vLLM does, then does what a test sets."""

    end: Exception | KeyboardInterrupt = RuntimeError("Engine core initialization failed. See root cause above.")

    def rows(self, *arguments: Any) -> Iterator[dict[str, Any]]:
        yield from islice(super().rows(*arguments), 7)
        os.write(1, b"INFO much\nERROR the root cause\n")
        raise self.end


@pytest.fixture
def talking(monkeypatch, tokenizer):
    monkeypatch.setattr(Talking, "tokenizer", tokenizer)
    monkeypatch.setattr(run, "Engine", Talking)
    return Talking


@pytest.mark.usefixtures("talking")
def test_an_engine_that_ends_shows_the_end_of_its_log(capfd, tmp_path):
    with pytest.raises(RuntimeError, match="See root cause above"):
        cli.evaluate([*COMMAND, "--out", str(tmp_path)])
    captured = capfd.readouterr()
    assert "ERROR" not in captured.out
    assert captured.err.endswith(f"The last lines of {tmp_path / 'vllm.log'}:\n  INFO much\n  ERROR the root cause\n")
    assert (tmp_path / "vllm.log").read_text() == "INFO much\nERROR the root cause\n"


@pytest.mark.usefixtures("talking")
def test_the_log_is_printed_if_asked_for(capfd, tmp_path):
    with pytest.raises(RuntimeError, match="See root cause above"):
        cli.evaluate([*COMMAND, "--out", str(tmp_path), "--verbose"])
    assert "INFO much\nERROR the root cause\n" in capfd.readouterr().out
    assert not (tmp_path / "vllm.log").exists()


def test_an_interrupt_reports_what_was_measured(capsys, tmp_path, talking, monkeypatch):
    monkeypatch.setattr(talking, "end", KeyboardInterrupt())
    with pytest.raises(SystemExit) as ended:
        cli.evaluate([*COMMAND, "--out", str(tmp_path)])
    assert ended.value.code == 130
    captured = capsys.readouterr()
    assert "Interrupted; the report covers the rows that were finished." in captured.err
    assert captured.out.splitlines()[-1] == str(tmp_path / "report.html")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 7


@pytest.mark.usefixtures("mute")
def test_a_run_that_was_killed_is_reported_and_goes_on(capsys, tmp_path):
    """A kill leaves half a row at the end of the file, which once broke the report."""
    command = [*COMMAND, "--out", str(tmp_path)]
    cli.evaluate(command)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    cli.evaluate(["report", str(path), "--out", str(tmp_path / "again")])
    assert f"{path}:10 is an incomplete row" in capsys.readouterr().err
    cli.evaluate(command)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 9 + 10


@pytest.mark.usefixtures("mute")
def test_bad_texts_are_refused(capsys, tmp_path):
    path = tmp_path / "text"
    assert str(path) in refused(capsys, "needle", "model", "--text", str(path))
    path.write_text("Short.")
    assert "got 2; give another." in refused(capsys, "perplexity", "model", "--text", str(path))


def test_a_broken_row_is_reported_before_the_engine_starts(capsys, tmp_path):
    """`no_engine` fails the test if an engine starts."""
    (tmp_path / "rows.jsonl").write_text('{"half": \n{"task": "passkey"}\n')
    line = refused(capsys, *COMMAND, "--out", str(tmp_path))
    assert "argument --out: " in line
    assert "rows.jsonl:1 is not JSON" in line


def test_an_internal_error_is_not_reported_as_a_bad_option(tmp_path, talking, monkeypatch):
    """A `ValueError` in the measurement itself is shown with its traceback."""
    monkeypatch.setattr(talking, "end", ValueError("zip() argument 2 is shorter than argument 1"))
    with pytest.raises(ValueError, match="is shorter"):
        cli.evaluate([*COMMAND, "--out", str(tmp_path)])


@pytest.mark.parametrize("where", ["__init__", "rows"])
def test_an_interrupt_before_the_first_row_ends_quietly(capsys, tmp_path, talking, monkeypatch, where):
    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(talking, where, interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.evaluate([*COMMAND, "--out", str(tmp_path)])
    assert ended.value.code == 130
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "report.html").exists()


def test_a_run_without_rows_is_an_error(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    line = refused(capsys, "report", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"))
    assert line.endswith(f"argument ROWS: there are no rows in {tmp_path / 'rows.jsonl'}.")


def test_a_folder_that_cannot_be_made_is_an_error(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "argument --out: " in refused(capsys, "passkey", "model", "--out", str(tmp_path / "file" / "out"))


def test_missing_rows_are_an_error(capsys, tmp_path):
    assert "rows.jsonl" in refused(capsys, "report", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"))
