"""`vllm-l2kv bench` from its options to its page, against fake servers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from weights import made_up_weights, write_profile

from vllm_l2kv.cli import main
from vllm_l2kv.profile import Target
from vllm_l2kv.tools.bench import cli

QUICK = ["--requests", "6", "--concurrency", "3", "--prompt-tokens", "20:60", "--output-tokens", "2:5"]
QUICK += ["--sample-seconds", "0.02"]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.bench(words)
    return caught.value.code or 0


def refused(capsys, *words: str) -> str:
    """Returns the only line on standard error."""
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def rows_of(folder: Path, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratios", "0.5,0"], "--ratios: R must satisfy 0 < R <= 1, got 0."),
        (["--ratios", "half"], "--ratios: R must be a number with 0 < R <= 1, got 'half'."),
        (["--ratios", ""], "--ratios: must hold at least one value, got ''."),
        (["--budgets", "1024,0"], "--budgets: N must satisfy 1 <= N <= 2147483647, got 0."),
        (["--concurrency", "0"], "--concurrency: N must satisfy 1 <= N <= 2147483647, got 0."),
        (["--rate", "0"], "--rate: X must be a number with 0 < X, got '0'."),
        (["--rate", "inf"], "--rate: X must be a number with 0 < X, got 'inf'."),
        (["--rate", "1", "--concurrency", "2"], "--concurrency: not allowed with argument --rate"),
        (["--requests", "5", "--duration", "2"], "--duration: not allowed with argument --requests"),
        (["--requests", "0"], "--requests: N must satisfy 1 <= N <= 2147483647, got 0."),
        (["--duration", "-1"], "--duration: X must be a number with 0 < X, got '-1'."),
        (["--prompt-tokens", "7"], "--prompt-tokens: lengths must satisfy 8 <= LOW <= HIGH, got '7'."),
        (["--output-tokens", "x"], "--output-tokens: N must be an integer >= 1, got 'x'."),
        (["--shared-prefix", "1"], "--shared-prefix: X must be a number with 0 <= X < 1, got '1'."),
        (["--pid", "4194305"], "--pid: N must be the id of a process on this machine, got 4194305."),
        (["--compare-pid", "0"], "--compare-pid: N must satisfy 1 <= N <= 2147483647, got 0."),
        (["--seed", "-1"], "--seed: N must satisfy 0 <= N"),
        (["--fields", "[1]"], "--fields: must be a JSON object, got '[1]'."),
        (["--fields", "{"], "--fields: must be a JSON object, got '{'."),
        (["--url", "http://127.0.0.1:1"], "--url: no answer: "),
        (["--url", "nowhere"], "--url: no answer: "),
    ],
)
def test_bad_options_are_named_in_one_line(capsys, tmp_path, words, said):
    line = refused(capsys, *words, "--out", str(tmp_path))
    assert line.startswith("vllm-l2kv bench: error: argument ")
    assert said in line


class TestServersThatCannotBeTested:
    def test_the_stock_url_is_not_a_server_of_vllm_l2kv(self, capsys, start, tmp_path):
        line = refused(capsys, "--url", start(compresses=False).url, "--out", str(tmp_path))
        assert "argument --url: " in line
        assert "is stock; give a vllm-l2kv server" in line

    def test_the_url_is_not_a_stock_server(self, capsys, ours, start, tmp_path):
        line = refused(capsys, "--url", ours.url, "--compare", start().url, "--out", str(tmp_path))
        assert "argument --compare: " in line
        assert "is vllm-l2kv; give a server of stock vLLM" in line

    def test_too_long(self, capsys, start, tmp_path):
        words = ["--url", start(max_model_len=560).url, "--prompt-tokens", "100:500", "--out", str(tmp_path)]
        assert "--prompt-tokens: with --output-tokens must be at most 560 for fake of " in refused(capsys, *words)

    def test_an_unknown_model(self, capsys, ours, tmp_path):
        line = refused(capsys, "--url", ours.url, "--model", "gpt", "--out", str(tmp_path))
        assert "has no model 'gpt'; it has fake." in line

    def test_a_key(self, capsys, start, tmp_path, monkeypatch):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        fake = start(api_key="sesame")
        assert "/v1/models answers 401" in refused(capsys, "--url", fake.url, "--out", str(tmp_path))
        assert run("--url", fake.url, "--api-key", "sesame", "--ratios", "1", *QUICK, "--out", str(tmp_path)) == 0

    def test_another_tokenizer(self, capsys, ours, start, tmp_path):
        other = start(compresses=False, token=1)
        line = refused(capsys, "--url", ours.url, "--compare", other.url, "--out", str(tmp_path))
        assert "argument --compare: " in line
        assert "must serve a model with the tokenizer of" in line

    def test_results_of_another_run_are_kept(self, capsys, ours, tmp_path):
        (tmp_path / "rows.jsonl").write_text("mine\n")
        line = refused(capsys, "--url", ours.url, "--out", str(tmp_path))
        assert "argument --out: " in line
        assert (tmp_path / "rows.jsonl").read_text() == "mine\n"
        assert ours.bodies == []


class TestProfile:
    @pytest.fixture
    def profile(self, tmp_path) -> str:
        memory = (Target(0.5, (0, 1), 0.375, "keydiff"), Target(0.25, (0,), 0.166667, "l2"))
        write_profile(tmp_path / "p.safetensors", made_up_weights(10, 2, 32), memory=memory)
        return str(tmp_path / "p.safetensors")

    def test_a_round_by_its_ratio_and_scorer(self, ours, tmp_path, profile):
        assert run("--url", ours.url, "--kv-profile", profile, *QUICK, "--out", str(tmp_path / "out")) == 0
        assert [row["keep_ratio"] for row in rows_of(tmp_path / "out")] == [1, 0.375]
        asked = {(body["kv_scorer"], body["kv_granularity"]) for body in ours.measured(0.375)}
        assert asked == {("keydiff", "token")}

    def test_a_scorer_of_the_user(self, ours, tmp_path, profile):
        words = ["--kv-profile", profile, *QUICK, "--fields", '{"kv_scorer": "l2"}', "--out", str(tmp_path / "out")]
        assert run("--url", ours.url, *words) == 0
        assert {(body["kv_scorer"], "kv_granularity" in body) for body in ours.measured(0.375)} == {("l2", False)}

    def test_a_server_with_a_scorer_of_its_own(self, capsys, ours, tmp_path):
        """Its full layers are those that are best with its default scorer."""
        path = tmp_path / "p.safetensors"
        memory = (Target(0.5, (0, 1), 0.375, "keydiff"), Target(0.5, (4,), 0.444444, "l2"))
        write_profile(path, made_up_weights(10, 2, 32), memory=memory)
        words = ["--url", ours.url, "--kv-profile", str(path), *QUICK, "--out", str(tmp_path / "out")]
        ours.full = {"full_layers": [4], "fields": [{"name": "kv_scorer", "default": "keydiff"}]}
        assert "the profile has full layers 0, 1 at this memory, but" in refused(capsys, *words)
        ours.full["fields"][0]["default"] = "l2"
        assert run(*words) == 0
        assert [row["keep_ratio"] for row in rows_of(tmp_path / "out")] == [1, 0.444444]
        assert {body["kv_scorer"] for body in ours.measured(0.444444)} == {"l2"}

    def test_a_granularity_goes_with_its_scorer(self, ours, tmp_path):
        path = tmp_path / "p.safetensors"
        target = Target(0.5, (0, 1), 0.375, "learned", {}, "neighbors")
        write_profile(path, made_up_weights(10, 2, 32), memory=(target,))
        words = ["--url", ours.url, "--kv-profile", str(path), *QUICK, "--out", str(tmp_path / "out")]
        assert run(*words, "--fields", '{"kv_scorer": "learned"}') == 0
        asked = {(body["kv_scorer"], body["kv_granularity"]) for body in ours.measured(0.375)}
        assert asked == {("learned", "neighbors")}

    def test_a_server_with_other_full_layers(self, capsys, ours, tmp_path, profile):
        words = ["--url", ours.url, "--kv-profile", profile, "--kv-memory", "0.25", "--out", str(tmp_path / "out")]
        assert refused(capsys, *words).endswith(
            "argument --kv-profile: the profile has full layers 0 at this memory, but the server has full layers 0, 1; "
            "start the server with the same --kv-profile, --kv-memory and --kv-classes."
        )
        assert ours.bodies == []

    def test_a_server_with_other_full_heads(self, capsys, ours, tmp_path):
        memory = (Target(0.5, (0, 1), 0.375, "keydiff"), Target(0.5, (), 0.444444, "l2", {3: (0,), 4: (1,)}))
        path = tmp_path / "p.safetensors"
        write_profile(path, made_up_weights(10, 2, 32), memory=memory)
        words = ["--url", ours.url, "--kv-profile", str(path), "--kv-classes", "heads", "--out", str(tmp_path / "out")]
        line = refused(capsys, *words)
        assert "has full layers none, full heads 3:0 4:1 at this memory, but the server has full layers 0, 1;" in line
        ours.full = {"full_layers": [], "full_heads": {"3": [0], "4": [1]}}
        assert run(*words, *QUICK) == 0
        assert [row["keep_ratio"] for row in rows_of(tmp_path / "out")] == [1, 0.444444]

    def test_classes_are_those_of_the_server(self, capsys, ours, tmp_path, profile):
        """Which only the server can know: the default depends on its ranks."""
        path = tmp_path / "both.safetensors"
        memory = (Target(0.5, (0, 1), 0.375, "keydiff"), Target(0.5, (), 0.444444, "l2", {3: (0,), 4: (1,)}))
        write_profile(path, made_up_weights(10, 2, 32), memory=memory)
        for name, ratio in (("layers", 0.375), ("heads", 0.444444)):
            out = tmp_path / name
            assert run("--url", ours.url, "--kv-profile", str(path), *QUICK, "--out", str(out)) == 0
            assert [row["keep_ratio"] for row in rows_of(out)] == [1, ratio]
            ours.full = {"full_layers": [], "full_heads": {"3": [0], "4": [1]}}
        capsys.readouterr()
        words = ["--url", ours.url, "--kv-classes", "layers", "--out", str(tmp_path / "no")]
        line = refused(capsys, *words, "--kv-profile", str(path))
        assert "full layers 0, 1 at this memory, but the server has full layers none, full heads 3:0 4:1;" in line
        line = refused(capsys, *words[:2], *words[4:], "--kv-profile", profile)
        assert "has no settings with full heads; make it again, or take layers (--kv-classes layers)." in line


class TestRuns:
    def test_one_row_and_column_a_ratio(self, capsys, ours, tmp_path):
        out = tmp_path / "out"
        assert run("--url", f"{ours.url}/v1", "--ratios", "1,0.5", *QUICK, "--out", str(out), "--per-request") == 0
        rows = rows_of(out)
        assert [(row["engine"], row["keep_ratio"]) for row in rows] == [("vllm-l2kv", 1), ("vllm-l2kv", 0.5)]
        for row in rows:
            assert (row["num_requests"], row["num_failed"], row["errors"]) == (6, 0, {})
            asked = ours.measured(row["keep_ratio"])
            assert row["prompt_tokens"] == sum(len(body["prompt"]) for body in asked)
            assert row["output_tokens"] == sum(body["max_tokens"] for body in asked)
            assert row["load"]["prompt_tokens"] == "20:60"
            assert row["preemptions"] == 6  # as the fake counts them, after the warm-ups
            assert row["num_samples_failed"] == 0
        assert rows[0]["evicted_tokens"] == 0 < rows[1]["evicted_tokens"]
        assert rows[1]["own_metrics"]["vllm_l2kv:rows_evicted_total"] == rows[1]["evicted_tokens"]
        requests = rows_of(out, "requests.jsonl")
        assert sorted(row["number"] for row in requests if row["keep_ratio"] == 0.5) == list(range(6))
        said = capsys.readouterr()
        assert said.out.splitlines()[-1] == str(out / "report.html")
        assert "keep 1  keep 0.5" in said.out
        assert "prefix cache" not in said.err
        assert f"{rows[1]['evicted_tokens']:,}" in (out / "report.html").read_text()
        assert rows[0]["memory_ratio"] == 1
        assert re.search(rf"memory of the whole KV cache \(%\) +100 +{100 * rows[1]['memory_ratio']:.1f}\n", said.out)

    def test_budgets_come_after_ratios(self, capsys, ours, start, tmp_path):
        words = ["--url", ours.url, "--compare", start(compresses=False).url, "--ratios", "1,0.5", "--budgets", "30,25"]
        assert run(*words, *QUICK, "--out", str(tmp_path)) == 0
        rows = [row for row in rows_of(tmp_path) if row["engine"] == "vllm-l2kv"]
        assert [(row["keep_ratio"], row["max_tokens"]) for row in rows] == [(1, None), (0.5, None), (1, 30), (1, 25)]
        for row in rows[2:]:
            asked = ours.measured(1, row["max_tokens"])
            lengths = [sorted(body["max_tokens"] for body in bodies) for bodies in (asked, ours.measured(1))]
            assert lengths[0] == lengths[1]
            assert row["evicted_tokens"] == sum(max(len(body["prompt"]) - row["max_tokens"], 0) for body in asked) > 0
            assert row["kept_tokens"] + row["evicted_tokens"] == row["prompt_tokens"] + row["output_tokens"] - 6
            assert row["compactions"] > 0
        assert re.search("keep 1 +keep 0.5 +budget 30 +budget 25", capsys.readouterr().out)

    def test_ratios_get_the_same_lengths_and_other_prompts(self, ours, tmp_path):
        run("--url", ours.url, "--ratios", "1,0.5", *QUICK, "--concurrency", "1", "--out", str(tmp_path))
        whole, half = ours.measured(1), ours.measured(0.5)
        sizes = [[(len(body["prompt"]), body["max_tokens"]) for body in bodies] for bodies in (whole, half)]
        assert sizes[0] == sizes[1]
        assert len(set(sizes[0])) > 1
        starts = {tuple(body["prompt"][:4]) for body in ours.bodies}
        assert len(starts) == len(ours.bodies) == 2 * (2 + 6)
        assert len({body["prompt"][1] for body in whole} | {body["prompt"][1] for body in half}) == 2

    def test_stock_gets_the_same_load_uncompressed(self, capsys, ours, start, tmp_path):
        stock = start(compresses=False)
        words = ["--ratios", "1,0.5,0.25", *QUICK, "--shared-prefix", "0.5", "--rate", "500"]
        words = [word for word in words if word not in ("--concurrency", "3")]
        assert run("--url", ours.url, "--compare", stock.url, *words, "--out", str(tmp_path)) == 0
        order = [(row["engine"], row["keep_ratio"]) for row in rows_of(tmp_path)]
        assert order == [
            ("vllm-l2kv", 1),
            ("stock", 1),
            ("stock", 0.5),
            ("vllm-l2kv", 0.5),
            ("vllm-l2kv", 0.25),
            ("stock", 0.25),
        ]

        def asked(fake) -> list[str]:
            return sorted(json.dumps([body["prompt"], body["max_tokens"]]) for body in fake.bodies)

        assert asked(ours) == asked(stock)
        assert not any(name.startswith("kv_") for body in stock.bodies for name in body)
        assert "vllm-l2kv / stock" in capsys.readouterr().out

    def test_a_duration(self, ours, tmp_path):
        words = [
            "--duration",
            "0.3",
            "--rate",
            "40",
            "--prompt-tokens",
            "20",
            "--output-tokens",
            "2",
            "--ratios",
            "1,0.5",
        ]
        assert run("--url", ours.url, *words, "--out", str(tmp_path)) == 0
        whole, half = (row["num_requests"] for row in rows_of(tmp_path))
        assert whole == half > 3

    def test_fields_go_to_vllm_l2kv_alone(self, ours, start, tmp_path):
        stock = start(compresses=False)
        fields = ["--fields", '{"kv_scorer": "keydiff"}']
        run("--url", ours.url, "--compare", stock.url, "--ratios", "0.5", *QUICK, *fields, "--out", str(tmp_path))
        assert {body["kv_scorer"] for body in ours.bodies} == {"keydiff"}
        assert not any("kv_scorer" in body for body in stock.bodies)

    def test_some_failures_are_counted_and_reported(self, capsys, start, tmp_path):
        fake = start(broken=lambda body: (503, "Full.") if body["max_tokens"] == 2 else None)
        words = ["--url", fake.url, "--ratios", "1", *QUICK, "--requests", "20", "--out", str(tmp_path)]
        assert run(*words) == 0
        (row,) = rows_of(tmp_path)
        twos = sum(body["max_tokens"] == 2 for body in fake.measured(1))
        assert 0 < row["num_failed"] == twos < 20
        assert row["errors"] == {"503 Full.": twos}
        assert f"vllm-l2kv, keep 1: {twos} x 503 Full." in capsys.readouterr().err
        assert "503 Full." in (tmp_path / "report.html").read_text()

    def test_the_exit_status_is_1_if_all_requests_fail(self, capsys, start, tmp_path):
        fake = start(broken=lambda body: (500, "Dead."))
        assert run("--url", fake.url, "--ratios", "1,0.5", *QUICK, "--out", str(tmp_path)) == 1
        assert [row["errors"] for row in rows_of(tmp_path)] == [{"500 Dead.": 6}] * 2
        assert (tmp_path / "report.html").exists()

    def test_prompts_found_in_the_prefix_cache_are_reported(self, capsys, start, tmp_path):
        words = ["--url", start(hits=0.4).url, "--ratios", "1", *QUICK]
        assert run(*words, "--out", str(tmp_path / "a")) == 0
        assert "40% of the prompt tokens were found in the prefix cache, but only 0%" in capsys.readouterr().err
        assert run(*words, "--shared-prefix", "0.5", "--out", str(tmp_path / "b")) == 0
        assert "prefix cache" not in capsys.readouterr().err

    def test_a_server_without_metrics_is_tested_too(self, start, tmp_path):
        words = ["--url", start(metrics=False).url, "--ratios", "1", *QUICK, "--out", str(tmp_path)]
        assert run(*words) == 0
        (row,) = rows_of(tmp_path)
        assert row["num_failed"] == 0 < row["num_samples_failed"]
        assert row["running"] is row["kv_cache_usage"] is row["preemptions"] is row["prefix_hits"] is None

    def test_a_folder_that_cannot_be_made(self, capsys, ours, tmp_path):
        (tmp_path / "file").write_text("")
        assert "argument --out: " in refused(capsys, "--url", ours.url, "--out", str(tmp_path / "file" / "out"))

    def test_an_interrupt_reports_the_results_so_far(self, ours, tmp_path, monkeypatch):
        from vllm_l2kv.tools.bench import run as rounds_of

        def two(plan, prompts, real=rounds_of.rounds):
            yield next(real(plan, prompts))
            raise KeyboardInterrupt

        monkeypatch.setattr(rounds_of, "rounds", two)
        assert run("--url", ours.url, *QUICK, "--out", str(tmp_path)) == 130
        assert len(rows_of(tmp_path)) == 1
        assert (tmp_path / "report.html").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--help"])
    assert caught.value.code == 0
    assert "lognormal:MEDIAN:SIGMA:HIGH" in capsys.readouterr().out
