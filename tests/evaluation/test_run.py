"""Cases through the real engine: losses equal a reference's, and the whole command leaves its files."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import vllm
from reference import Reference

from vllm_l2kv.messages.usage import USAGE_KEY
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import CompactionPoints, Intervals
from vllm_l2kv.tools.evaluation.cases import Case
from vllm_l2kv.tools.evaluation.run import Engine
from vllm_l2kv.tools.evaluation.tasks import perplexity
from vllm_l2kv.tools.evaluation.texts import encode, read_text
from vllm_l2kv.tools.evaluation.variants import BASELINE, QUESTIONS, SEEN

pytestmark = pytest.mark.engine

FULL_LAYERS = (0, 1)
INTERVALS = Intervals(prompt=64, answer=16)
BUDGET = CompressionParams(max_tokens=100, protect_first=4, protect_last=16)
VARIANTS = [BASELINE, CompressionParams(0.5, 0, 0), CompressionParams(0.25, protect_first=4, protect_last=16)]


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def engine(folder):
    engine = Engine(str(folder), FULL_LAYERS, INTERVALS, max_model_len=1024, num_gpu_blocks_override=200)
    # As in `engine.running`: vLLM's own shutdown would end every other engine of this process.
    engine._llm.llm_engine.engine_core._finalizer.detach()
    return engine


def test_losses_are_those_of_the_reference(engine, folder):
    """Losses of forced text at every position, before and after a compaction, with prompts from the prefix cache."""
    reference = Reference(folder)
    cases = list(perplexity.cases(engine.tokenizer, read_text("moby_dick"), [200, 333], 2, num_continued=24))
    rows = list(engine.rows("perplexity", cases, VARIANTS))
    assert len(rows) == len(cases) * len(VARIANTS)
    assert {(row["device"], row["dtype"], row["vllm"]) for row in rows} == {("CPU", "float32", vllm.__version__)}
    for i, row in enumerate(rows):
        case, variant = cases[i // len(VARIANTS)], VARIANTS[i % len(VARIANTS)]
        protection = (variant.protect_first, variant.protect_last)
        logits = reference.logits(case.prompt, case.forced, str(variant.keep_ratio), FULL_LAYERS, *protection)
        losses = -logits.log_softmax(-1).gather(-1, torch.tensor(case.forced)[:, None])[1:, 0]
        assert row["losses"] == pytest.approx(losses.tolist(), abs=2e-3)
        assert row["loss"] == pytest.approx(losses.mean().item(), abs=2e-3)
        hits = (logits.argmax(-1) == torch.tensor(case.forced))[1:]
        assert row["hits"] == hits.int().tolist()
        assert (row["keep_ratio"], row["protect_last"], row["length"]) == (
            variant.keep_ratio,
            variant.protect_last,
            case.about["length"],
        )


def test_a_variant_changes_nothing_for_another(engine):
    """The same case alone, and in the middle of many."""
    text = read_text("state_of_the_union")
    cases = list(perplexity.cases(engine.tokenizer, text, [256], 6, num_continued=8))
    many = list(engine.rows("perplexity", cases, VARIANTS))
    alone = list(engine.rows("perplexity", cases[3:4], VARIANTS[1:2]))
    assert alone[0]["losses"] == pytest.approx(many[3 * len(VARIANTS) + 1]["losses"], abs=2e-3)


def test_hidden_questions_are_asked_after_the_document_was_compressed(engine):
    """The whole cache, which does not depend on that, is measured once."""
    made = perplexity.cases(engine.tokenizer, read_text("moby_dick"), [300], 2, num_continued=24)
    cases = [replace(case, num_document_tokens=200) for case in made]
    rows = list(engine.rows("perplexity", cases, VARIANTS, questions=QUESTIONS))
    assert [row["question"] for row in rows] == ["seen", "seen", "hidden", "seen", "hidden"] * 2
    assert [row["prefix_tokens"] for row in rows[:5]] == [None, None, 200, None, 200]
    num_tokens = 300 + 24  # the last one of 25 is not computed
    for row, num_evicted in zip(rows[:5], [0, 150, 100, 225, 150], strict=True):
        # Two of four layers are full.
        assert row["memory"] == pytest.approx(1 - num_evicted / num_tokens / 2, abs=1e-4)
    assert rows[2]["losses"] != pytest.approx(rows[1]["losses"], abs=2e-3)


def test_budgets_compact_prompt_and_answer_at_the_intervals(engine):
    """The scheduler's report of each request equals the rule's list of compactions."""
    usages = []

    def keep_usage(step=engine._llm.llm_engine.step):
        outputs = step()
        finished = [output for output in outputs if output.finished]
        usages.extend((output.request_id, (output.kv_transfer_params or {}).get(USAGE_KEY)) for output in finished)
        return outputs

    cases = list(perplexity.cases(engine.tokenizer, read_text("moby_dick"), [300], 1, num_continued=60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._llm.llm_engine, "step", keep_usage)
        whole, budget = engine.rows("perplexity", cases, [BASELINE, BUDGET])
    assert (whole["max_tokens"], budget["max_tokens"], budget["keep_ratio"]) == (None, 100, 1)
    assert (budget["prompt_interval"], budget["answer_interval"]) == INTERVALS
    assert "answer_interval" not in whole
    points = list(CompactionPoints(300, BUDGET, INTERVALS).until(300 + 59))
    assert {point.kind for point in points} == {"prompt_budget", "answer_budget"}
    assert dict(usages)["1"]["compactions"] == len(points)
    assert dict(usages)["1"]["evicted_tokens"] == points[-1].num_evicted
    assert budget["losses"] != pytest.approx(whole["losses"], abs=2e-3)


def test_cases_larger_than_the_cache_run_one_by_one(engine):
    """Prompts, copies and answers of a group fit into the cache."""
    prompt = encode(engine.tokenizer, read_text("moby_dick"))[:900]
    cases = [Case(prompt, 8, lambda answer: {}) for _ in range(6)]
    asked = [(variant, SEEN) for variant in VARIANTS]
    groups = list(engine._groups(cases, asked))
    assert len(list(engine._groups(cases, [*asked, *[(BUDGET, SEEN)] * 30]))) > len(groups)
    assert [case for group in groups for case in group] == cases
    size = len(prompt) + sum(math.ceil(900 * variant.keep_ratio) + 8 for variant in VARIANTS)
    assert all(len(group) == 1 or len(group) * size <= 200 * 32 for group in groups)
    assert len(groups) == math.ceil(len(cases) / (int(0.9 * 200 * 32) // size))


def test_command(folder, tmp_path):
    """Rows, plots and report of a run; the same run again changes no number of the report."""

    def run(*words: str) -> None:
        command = [sys.executable, "-m", "vllm_l2kv.cli", "eval", *words]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)

    run(
        "passkey",
        str(folder),
        "--out",
        "out",
        "--lengths",
        "300",
        "--depths",
        "0,1",
        "--samples",
        "2",
        "--ratios",
        "0.5",
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 5  # no compression, l2, three controls
    assert {row["model"] for row in rows} == {folder.name}
    assert all(row["full_layers"] == [0, 1] and row["score"] in (0, 1) for row in rows)
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == len(list((tmp_path / "out").glob("*.png"))) == 2
    run("report", "out/rows.jsonl", "out/rows.jsonl", "--out", "again")
    assert "n=4" in report
    assert (tmp_path / "again" / "report.html").read_text().count("n=4)") == report.count("n=4)")
