"""The command line of lm-evaluation-harness against the real server, with a small local task."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from http_server import Server, expected_usage

pytestmark = pytest.mark.slow

MODEL = "SmolLM2-135M-Instruct"
NUMBERS = {"Anna": "4817", "Brenda": "2963", "Clara": "7354", "Dora": "1640", "Edith": "8092", "Flora": "5271"}
BOOK = "".join(["Harbour book.\n", *(f"{name}: {number}\n" for name, number in NUMBERS.items()), "Once more.\n"])
WHOLE, QUARTER = 1.0, 0.25
PROTECT_LAST = 8

TASK = """\
task: boats
dataset_path: json
dataset_kwargs: {data_files: {test: boats.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{number}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
filter_list:
  - name: number
    filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


class Run(NamedTuple):
    """Results that lm-evaluation-harness wrote about the task."""

    results: dict[str, Any]
    samples: list[dict[str, Any]]


def lm_eval(server: Server, folder: Path, gen_kwargs: str) -> subprocess.CompletedProcess[str]:
    (folder / "boats.yaml").write_text(TASK)
    docs = [{"prompt": f"{BOOK}{name}:", "number": number} for name, number in NUMBERS.items()]
    (folder / "boats.jsonl").write_text("\n".join(map(json.dumps, docs)))
    arguments = {
        "model": "local-completions",
        "model_args": f"model={MODEL},base_url={server.url}/v1/completions,tokenizer_backend=none,max_retries=1",
        "gen_kwargs": gen_kwargs,
        "tasks": "boats",
        "include_path": ".",
        "output_path": "out",
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    return subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *words, "--log_samples"],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory) -> dict[float, Run]:
    """The same task at both ratios."""
    runs = {}
    for ratio in (WHOLE, QUARTER):
        folder = tmp_path_factory.mktemp("lm_eval")
        done = lm_eval(server, folder, f"kv_keep_ratio={ratio},kv_protect_last={PROTECT_LAST}")
        assert done.returncode == 0, done.stderr
        (results,) = folder.glob("out/*/results_*.json")
        (samples,) = folder.glob("out/*/samples_boats_*.jsonl")
        runs[ratio] = Run(
            json.loads(results.read_text()), [json.loads(line) for line in samples.read_text().splitlines()]
        )
    return runs


def answers(run: Run) -> list[str]:
    return [sample["resps"][0][0] for sample in run.samples]


def test_all_samples_are_scored(runs):
    for run in runs.values():
        assert run.results["n-samples"]["boats"] == {"original": len(NUMBERS), "effective": len(NUMBERS)}
        right = sum(sample["exact_match"] for sample in run.samples)
        assert run.results["results"]["boats"]["exact_match,number"] == right / len(NUMBERS)


def test_answers_are_those_of_direct_requests_with_the_same_ratio(server, runs):
    for ratio, run in runs.items():
        for sample, answer in zip(run.samples, answers(run), strict=True):
            body = {
                "model": MODEL,
                "prompt": sample["doc"]["prompt"],
                "max_tokens": 8,
                "temperature": 0,
                "stop": ["\n"],
                "kv_keep_ratio": ratio,
                "kv_protect_last": PROTECT_LAST,
            }
            direct = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
            lengths = (direct["usage"][f"{which}_tokens"] for which in ("prompt", "completion"))
            expected = expected_usage(*lengths, keep_ratio=ratio, protect_last=PROTECT_LAST)
            assert direct["usage"]["kv_cache"] == expected
            assert direct["choices"][0]["text"] == answer


def test_the_ratio_shows_in_answers_and_score(runs):
    """Otherwise equal answers would not show which ratio the harness requested."""
    assert answers(runs[WHOLE]) != answers(runs[QUARTER])
    whole, quarter = (runs[ratio].results["results"]["boats"]["exact_match,number"] for ratio in (WHOLE, QUARTER))
    assert whole > quarter


def test_log_likelihoods_are_those_of_the_whole_cache(server):
    """The harness requests one token and `echo`, which a ratio cannot change, as the numbers show."""
    body = {"model": MODEL, "prompt": BOOK, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    whole, quarter = (
        httpx.post(f"{server.url}/v1/completions", json={**body, **fields}, timeout=60).raise_for_status().json()
        for fields in ({}, {"kv_keep_ratio": QUARTER})
    )
    assert quarter["usage"]["kv_cache"]["evicted_tokens"] == 0
    logprobs = [answer["choices"][0]["logprobs"]["token_logprobs"] for answer in (whole, quarter)]
    assert logprobs[1][1:] == pytest.approx(logprobs[0][1:], abs=1e-4)  # the first token has none


def test_a_misspelt_field_ends_the_run(server, tmp_path):
    done = lm_eval(server, tmp_path, "kv_keep_rate=0.5")
    assert done.returncode != 0
    assert "kv_keep_rate" in done.stderr
    assert "400" in done.stderr
    assert not list(tmp_path.glob("out/*"))
