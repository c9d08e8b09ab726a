"""Load tests against the real server: `vllm-l2kv bench`, and `vllm bench serve` as docs/load_testing.md starts it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from http_server import expected_usage

pytestmark = pytest.mark.engine

MODEL = "SmolLM2-135M-Instruct"
VLLM_BENCH = Path(__file__).parents[2] / "benchmarks" / "load" / "vllm_bench_serve.py"


def bench(server, out: Path, *words: str) -> list[dict[str, Any]]:
    """Returns the rows of the requests, then those of the rounds."""
    command = [sys.executable, "-m", "vllm_l2kv.cli", "bench", "--url", server.url, "--out", str(out), *words]
    done = subprocess.run(
        [*command, "--per-request", "--sample-seconds", "0.1"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return [
        json.loads(line) for name in ("requests", "rows") for line in (out / f"{name}.jsonl").read_text().splitlines()
    ]


def most_at_once(requests: Sequence[dict[str, Any]]) -> int:
    """Largest number of requests that have been sent and not yet answered, at any time."""
    spans = [(request["start_s"], request["start_s"] + request["end_to_end_s"]) for request in requests]
    return max(sum(start <= begin < end for start, end in spans) for begin, _ in spans)


def test_ratios_and_budgets_side_by_side(server, tmp_path):
    # The server's answer interval is 256, so prompts of more than 306 tokens are compacted to this budget.
    words = "--ratios 1,0.25 --budgets 50 --requests 6 --concurrency 3 --prompt-tokens 250:400 --output-tokens 6"
    *requests, whole, quarter, budget = bench(server, tmp_path, *words.split(), "--warmup", "1")
    assert len(requests) == 18
    for row in requests:
        assert row["error"] is None
        assert len(row["gaps_s"]) <= 5  # a busy server sends several waiting tokens together
        asked = {"keep_ratio": row["keep_ratio"], "max_tokens": row["max_tokens"]}
        assert row["kv_cache"] == expected_usage(row["prompt_tokens"], row["output_tokens"], **asked)
    for i, row in enumerate((whole, quarter, budget)):
        of_round = requests[6 * i : 6 * (i + 1)]
        assert any(request["gaps_s"] for request in of_round)
        assert most_at_once(of_round) == 3
        assert (row["num_requests"], row["num_failed"], row["output_tokens"]) == (6, 0, 36)
        assert (row["prefix_hits"], row["preemptions"]) == (0, 0)
        assert 0 < row["running"]["max"] <= 3  # samples of .1 s may miss the moments with three
        assert 0 < row["kv_cache_usage"]["max"] < 1
        # The engine, with the model and the cache, is a separate process.
        assert row["memory"]["tree"] > row["memory"]["process"] > 2**28
        assert row["first_token_s"]["p50"] < row["end_to_end_s"]["p50"] < row["duration_s"]
    assert whole["evicted_tokens"] == 0 < quarter["evicted_tokens"]
    assert (whole["compactions"], quarter["compactions"]) == (0, 6)
    assert 0 < budget["compactions"] < 6
    assert budget["own_metrics"]["vllm_l2kv:compactions_total"] == budget["compactions"]
    assert budget["own_metrics"]["vllm_l2kv:rows_evicted_total"] == budget["evicted_tokens"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img ") == len(list(tmp_path.glob("*.png"))) == 6
    assert f"<td>{quarter['evicted_tokens']:,}</td>" in page


def test_a_shared_prefix_is_found(server, tmp_path):
    words = "--ratios 0.5 --requests 4 --concurrency 1 --prompt-tokens 200 --output-tokens 2 --warmup 0 --seed 5"
    row = bench(server, tmp_path, *words.split(), "--shared-prefix", "0.8")[-1]
    # 160 tokens are five blocks of 32; the first prompt finds none of them.
    assert row["prefix_hits"] == pytest.approx(3 * 160 / (4 * 200))


def vllm_bench_serve(server, folder: Path, demo_model: Path, extra_body: str) -> subprocess.CompletedProcess[str]:
    words = "--dataset-name random --input-len 100 --output-len 4 --num-prompts 3 --max-concurrency 2 --ignore-eos"
    about = ["--base-url", server.url, "--model", MODEL, "--tokenizer", str(demo_model), "--extra-body", extra_body]
    results = ["--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", "result.json"]
    return subprocess.run(
        [sys.executable, str(VLLM_BENCH), *words.split(), *about, *results, "--disable-tqdm"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_vllm_bench_serve(server, tmp_path, demo_model):
    done = vllm_bench_serve(server, tmp_path, demo_model, '{"kv_keep_ratio": 0.5}')
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (3, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (300, 12)


@pytest.mark.slow
def test_vllm_bench_serve_gets_an_error_for_a_misspelt_field(server, tmp_path, demo_model):
    """This shows that the fields of `--extra-body` arrive as fields of the request."""
    vllm_bench_serve(server, tmp_path, demo_model, '{"kv_keep_rate": 0.5}')
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (0, 3)
    assert result["errors"] == ["Bad Request"] * 3
