"""`vllm-l2kv plan`, and its difference from measurements on an H100."""

import json
import math
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig
from vllm.config import CacheConfig
from vllm.platforms.interface import UnspecifiedPlatform
from weights import made_up_weights, write_profile

from vllm_l2kv.profile import Target, ratio_for
from vllm_l2kv.scorers import Weights
from vllm_l2kv.tools.plan import cli
from vllm_l2kv.tools.plan.table import COLUMNS

DOCUMENTS = "--kv-cache-gib 16 --context 30200 --output 200 --document-tokens 30000 --budgets 7500"
"""Options of the example in docs/sizing.md."""
CHOOSING = Path(__file__).parents[2] / "docs/choosing.md"
DOCUMENT, QUESTION, ANSWER = 30_000, 200, 200
"""Numbers of tokens in its table of memory."""
MEASURED = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "benchmarks/speed/results/h100_memory_bound.jsonl")
    .read_text()
    .splitlines()
]


@pytest.fixture
def plan(capsys):
    def run(model: str, **options: Any) -> dict[str, Any]:
        options = {"context": 8000, "output": 1000, "protect": "0:0", **options}
        cli.plan([model, "--json", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())])
        return json.loads(capsys.readouterr().out)

    return run


def engine_of(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(engine for engine in result["engines"] if engine["engine"] == name)


def row_of(result: dict[str, Any], name: str, keep_ratio: float, budget: int | None = None) -> dict[str, Any]:
    kept = (keep_ratio, budget)
    return next(row for row in engine_of(result, name)["rows"] if (row["keep_ratio"], row["max_tokens"]) == kept)


def named(measured: dict[str, Any]) -> str:
    return "-".join(str(measured[key]) for key in ("engine", "kv_cache_dtype", "keep_ratio"))


@pytest.mark.parametrize("measured", MEASURED, ids=named)
def test_measured_rows(plan, llama_8b, measured):
    result = plan(llama_8b, kv_cache_gib=16, ratio="0.5,0.25,0.1", kv_cache_dtype=measured["kv_cache_dtype"])
    name = "stock" if measured["engine"] == "stock" else "vllm-l2kv"
    engine = engine_of(result, name)
    assert engine["block_bytes"] == measured["block_bytes"]
    assert engine["num_blocks"] == measured["cache_bytes"] // measured["block_bytes"]
    assert [[group["layers"], group["block_size"]] for group in engine["groups"]] == measured["groups"]
    planned = row_of(result, name, measured["keep_ratio"])
    assert planned["on_average"] == pytest.approx(measured["mean_running"], rel=0.03)
    assert planned["at_once"] <= measured["peak_running"]


def test_blocks_of_a_whole_h100(plan, llama_8b):
    """The estimate of everything else in a GPU's memory, of which only the cache was measured.

    The rows are of a context of 131,072 tokens, for which the kernels of vllm-l2kv need 1 % of the memory. The plan
    leaves that out.
    """
    result = plan(llama_8b, gpu_gib=80)
    for measured in MEASURED[:2]:
        engine = engine_of(result, "stock" if measured["engine"] == "stock" else "vllm-l2kv")
        assert engine["num_blocks"] == pytest.approx(measured["num_blocks"], rel=0.015)


def test_no_device_is_needed(monkeypatch, plan, llama_8b):
    """A CUDA build of vLLM on a machine without a GPU."""
    here = plan(llama_8b, gpu_gib=80)
    monkeypatch.setattr("vllm.platforms._current_platform", UnspecifiedPlatform())
    assert plan(llama_8b, gpu_gib=80) == here


def test_memory_of_a_gpu(plan, llama_8b):
    options = {"gpu_gib": 80, "gpu_memory_utilization": 0.9, "overhead_gib": 2, "tensor_parallel_size": 2}
    memory = plan(llama_8b, **options)["memory_of_a_gpu"]
    assert memory["used_gib"] == 72
    assert memory["weights_gib"] == 8_030_261_248 / 2**30
    assert memory["kv_cache_gib"] == 72 - memory["weights_gib"] - 2
    assert plan(llama_8b, weights_gib=10, **options)["memory_of_a_gpu"]["kv_cache_gib"] == 72 - 5 - 2


def test_a_prompt_counts_whole_while_it_is_computed(plan, llama_8b):
    """With room for just two whole prompts, the second may be computed while the first holds its kept tokens."""
    row = row_of(plan(llama_8b, kv_cache_gib=2, output=1), "vllm-l2kv", 0.25)
    num_blocks = engine_of(plan(llama_8b, kv_cache_gib=2), "vllm-l2kv")["num_blocks"] - 1
    assert row["prompt_blocks"] == 500 + 34
    assert row["answer_blocks"] == 126 + 34
    assert row["at_once"] == 1 + (num_blocks - 534) // 160 < num_blocks // 160


def test_a_prompt_that_does_not_fit_whole(plan, llama_8b):
    result = plan(llama_8b, kv_cache_gib=0.9)
    assert [row["at_once"] for row in engine_of(result, "vllm-l2kv")["rows"]] == [0, 0, 0]
    assert row_of(result, "vllm-l2kv", 0.25)["on_average"] == 0
    assert row_of(result, "stock", 1)["longest_request"] < 8000


def test_the_longest_request_fills_the_cache(plan, llama_8b):
    result = plan(llama_8b, kv_cache_gib=16, budgets="1024")
    engine, ours = (engine_of(result, name) for name in ("stock", "vllm-l2kv"))
    assert row_of(result, "stock", 1)["longest_request"] == 16 * (engine["num_blocks"] - 1)
    whole, *_, budget = (row["longest_request"] for row in ours["rows"])
    assert [row["longest_request"] for row in ours["rows"]] == [whole, whole, whole, budget]
    usable = ours["num_blocks"] - 1
    fits, does_not = (row_of(plan(llama_8b, kv_cache_gib=16, context=whole + more), "vllm-l2kv", 1) for more in (0, 1))
    assert fits["prompt_blocks"] <= usable < does_not["prompt_blocks"]
    # Full layers hold every token; the others the budget and an interval.
    assert budget == 240 * (usable - (1024 + 2048) // 16)


def test_any_length_fits_where_no_layer_is_full(capsys, plan, llama_8b):
    options = {"kv_cache_gib": 1, "full_layers": "", "budgets": "1024"}
    assert row_of(plan(llama_8b, **options), "vllm-l2kv", 1, 1024)["longest_request"] is None
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    cli.plan([llama_8b, "--context=8000", "--output=1000", *words])
    assert capsys.readouterr().out.count("  any\n") == 1


def test_a_budget_bounds_what_is_held(plan, llama_8b):
    """Prompts larger than the pool, and answers of any length."""
    lengths = {"kv_cache_gib": 2, "context": 100_000, "output": 8000, "budgets": "1024,4096"}
    result = plan(llama_8b, **lengths, prompt_interval=512, answer_interval=128)
    assert row_of(result, "vllm-l2kv", 0.25)["at_once"] == 0
    for budget in (1024, 4096):
        row = row_of(result, "vllm-l2kv", 1, budget)
        assert row["peak_rows"] == budget + 512
        assert budget <= row["kept_rows"] < budget + 128
        # Blocks have 240 and 16 tokens.
        assert row["answer_blocks"] <= -(-108_000 // 240) + (budget + 128) // 16
        assert row["mean_blocks"] == pytest.approx(104_000 / 240 + (budget + 64) / 16, abs=2)
        assert row["at_once"] >= 1


def test_a_prompt_below_its_budget_is_whole(plan, llama_8b):
    result = plan(llama_8b, kv_cache_gib=16, context=1000, output=100, budgets="1024")
    whole, budget = (row_of(result, "vllm-l2kv", 1, budget) for budget in (None, 1024))
    assert {**whole, "max_tokens": 1024, "longest_request": budget["longest_request"]} == budget


def test_protected_tokens_are_kept(plan, llama_8b):
    row = row_of(plan(llama_8b, kv_cache_gib=16, context=100, protect="4:64"), "vllm-l2kv", 0.25)
    assert row["kept_rows"] == 68


@pytest.fixture
def profile(tmp_path) -> Path:
    """A profile of the shape of Llama-3.1-8B: at a half, 8 of 32 layers are full."""
    memory = (Target(0.5, tuple(range(10, 18)), 0.333333, "l2"), Target(0.25, (10, 11), 0.2, "keydiff"))
    weights = made_up_weights(32, 8, 128)
    write_profile(tmp_path / "p.safetensors", Weights({"wl": weights.tensors["wl"]}, weights.rope), memory=memory)
    return tmp_path / "p.safetensors"


def test_a_profile_sets_layers_and_ratio(plan, llama_8b, profile):
    about = {"gpu_gib": 80, "kv_profile": profile}
    half, eighth = plan(llama_8b, **about), plan(llama_8b, kv_memory=0.125, **about)
    assert (half["full_layers"], half["profile"]) == (list(range(10, 18)), str(profile))
    rows = engine_of(half, "vllm-l2kv")["rows"]
    assert [(row["keep_ratio"], row["memory_ratio"]) for row in rows] == [(1, 1), (0.333333, 0.5)]
    assert row_of(half, "stock", 1)["memory_ratio"] == 1
    assert eighth["full_layers"] == [10, 11]
    assert row_of(eighth, "vllm-l2kv", 0.066667)["memory_ratio"] == pytest.approx(0.125, abs=2e-4)
    own = plan(llama_8b, full_layers="0,1", ratio="0.5,0.1", **about)
    assert own["full_layers"] == [0, 1]
    assert [row["keep_ratio"] for row in engine_of(own, "vllm-l2kv")["rows"]] == [1, 0.5, 0.1]


def test_the_best_setting_of_a_scorer(plan, llama_8b, tmp_path, capsys):
    """As a server with `--kv-scorer` takes it; that of another scorer is what the profile recommends."""
    memory = (
        Target(0.5, tuple(range(10, 18)), 0.333333, "keydiff"),
        Target(0.5, tuple(range(12)), 0.2, "l2"),
    )
    weights = made_up_weights(32, 8, 128)
    write_profile(tmp_path / "p", Weights({"wl": weights.tensors["wl"]}, weights.rope), memory=memory)
    about = {"gpu_gib": 80, "kv_profile": tmp_path / "p"}
    recommended, of_l2 = plan(llama_8b, **about), plan(llama_8b, kv_scorer="l2", **about)
    assert recommended["full_layers"] == list(range(10, 18))
    assert of_l2["full_layers"] == list(range(12))
    assert row_of(of_l2, "vllm-l2kv", 0.2)["memory_ratio"] == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(SystemExit):
        plan(llama_8b, kv_scorer="l2", full_layers="0,1", ratio="0.5", **about)
    assert "leave it out, or give --kv-profile and at most one of --full-layers" in capsys.readouterr().err


def test_a_profile_is_named_above_the_table(capsys, llama_8b, profile):
    cli.plan([llama_8b, "--gpu-gib", "80", "--context", "8000", "--output", "1000", "--kv-profile", str(profile)])
    assert f"full layers 10, 11, 12, 13, 14, 15, 16, 17, with the profile {profile}\n" in capsys.readouterr().out


HEADS = dict.fromkeys(range(4, 32), (1, 6)) | {20: tuple(range(8))}
"""62 of 256 heads: one whole layer, and equally many of every layer for each of two ranks."""


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_a_profile_sets_heads(plan, llama_8b, tmp_path, num_gpus):
    """The requested memory, by heads; blocks have 3 times as many tokens, since 194 / 62 rounds down to 3."""
    weights = made_up_weights(32, 8, 128)
    memory = (Target(0.5, (), ratio_for(0.5, 256, 62), "l2", HEADS),)
    write_profile(tmp_path / "p", Weights({"wl": weights.tensors["wl"]}, weights.rope), memory=memory)
    about = {"gpu_gib": 80, "kv_profile": tmp_path / "p", "kv_classes": "heads", "tensor_parallel_size": num_gpus}
    half = plan(llama_8b, **about)
    assert (half["full_layers"], half["full_heads"]["4"], len(half["full_heads"])) == ([], [1, 6], 28)
    ours = engine_of(half, "vllm-l2kv")
    assert [(row["keep_ratio"], row["memory_ratio"]) for row in ours["rows"]] == [(1, 1), (0.340206, 0.5)]
    assert {group["kind"]: (group["layers"], group["heads"], group["block_size"]) for group in ours["groups"]} == {
        "full": (28, 62 / num_gpus, 48 * num_gpus),
        "compressed": (31, 194 / num_gpus, 16 * num_gpus),
    }
    (row,) = (row for row in ours["rows"] if row["keep_ratio"] < 1)
    assert row["compacted_blocks"] == -(-8000 // (48 * num_gpus)) + -(-row["kept_rows"] // (16 * num_gpus))
    own = plan(llama_8b, full_layers="0,1", full_heads="20:1", gpu_gib=80, ratio="0.5")
    assert row_of(own, "vllm-l2kv", 0.5)["memory_ratio"] == round((17 + 239 / 2) / 256, 4)


def test_full_heads_are_named_and_counted_in_the_table(capsys, llama_8b):
    words = ["--gpu-gib", "80", "--context", "8000", "--output", "1000", "--full-layers", "", "--full-heads"]
    cli.plan([llama_8b, *words, "3:0,5 7:2", "9:1"])
    shown = capsys.readouterr().out
    assert "full layers none, full heads 3:0,5 7:2 9:1\n" in shown
    assert "4 full heads of 3 layers x 1,008 tokens" in shown
    assert "252 compressed heads of 32 layers x 16 tokens" in shown


def test_a_profile_of_another_shape(capsys, llama_8b, tmp_path):
    write_profile(tmp_path / "p", made_up_weights(32, 8, 64), memory=(Target(0.5, (10,), 0.483871, "l2"),))
    words = ["--gpu-gib", "80", "--context", "8000", "--output", "1000", "--kv-profile", str(tmp_path / "p")]
    with pytest.raises(SystemExit):
        cli.plan([llama_8b, *words])
    line = f"argument --kv-profile: {tmp_path / 'p'} was made for another model, made up: layers, KV heads or their"
    assert line in capsys.readouterr().err


def documents_of(result: dict[str, Any]) -> list[tuple[int, int, int | None]]:
    """Returns rows, blocks and number of documents, for each row of vllm-l2kv."""
    names = ("document_rows", "document_blocks", "documents")
    return [tuple(row[name] for name in names) for row in engine_of(result, "vllm-l2kv")["rows"]]


def test_documents_are_held_compressed_and_computed_whole(plan, llama_8b):
    """Blocks have 16 and 240 tokens. A document takes 2,000 of 8,593 blocks; it fills them, so a question takes more.

    After a compaction these are blocks that it has released.
    """
    result = plan(llama_8b, kv_cache_gib=16, ratio="0.5,0.25", document_tokens=30_000)
    assert engine_of(result, "vllm-l2kv")["num_blocks"] == 8594
    room = 8593 - 2000
    assert documents_of(result) == [
        (30_000, 2000, 1 + (room - 2) // 2000),
        (15_000, 938 + 125, 1 + room // (938 + 125)),
        (7_500, 469 + 125, 1 + room // (469 + 125)),
    ]
    stock = row_of(result, "stock", 1)
    assert (stock["document_blocks"], stock["documents"]) == (1875, 4)


def test_with_a_budget_a_document_is_never_whole(plan, llama_8b):
    result = plan(llama_8b, kv_cache_gib=2, ratio="1", budgets="4000", prompt_interval=1000, document_tokens=100_000)
    (_, _, whole), (rows, blocks, documents) = documents_of(result)
    usable = engine_of(result, "vllm-l2kv")["num_blocks"] - 1
    assert whole == 0
    assert (rows, blocks) == (4000, 250 + 417)
    # At its end it holds 5,000 rows.
    assert documents == 1 + (usable - (313 + 417)) // (250 + 417)


def test_documents_beside_windows(capsys, plan, tmp_path):
    """Of Gemma 3 270M: 15 layers have windows of 512 tokens, in five groups; three layers compress."""
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 3
    shape = {"num_hidden_layers": 18, "num_key_value_heads": 1, "head_dim": 256}
    Gemma3TextConfig(layer_types=types, sliding_window=512, dtype="bfloat16", **shape).save_pretrained(tmp_path)
    about = {"kv_cache_gib": 2, "full_layers": "", "document_tokens": 30_001, "budgets": "4000"}
    result = plan(str(tmp_path), **about)
    (_, _, whole), half, quarter, budget = documents_of(result)
    usable = engine_of(result, "vllm-l2kv")["num_blocks"] - 1
    windows = 5 * (32 + 1)
    # Steps of 8,192 tokens, two at once: most blocks when the third is computed, and the first has ended.
    computed = 1536 + 5 * (1536 - (8192 - 511) // 16)
    assert half == (15_001, 938 + windows, 1 + (usable - computed) // (938 + windows))
    assert quarter == (7501, 469 + windows, 1 + (usable - computed) // (469 + windows))
    # Most before the second compaction, at 8,096 tokens. What the first one released is reused.
    computed = 378 + 5 * 506
    assert budget == (4000, 250 + windows, 1 + (usable - computed) // (250 + windows))
    assert whole is row_of(result, "stock", 1)["documents"] is None
    cli.plan([str(tmp_path), "--context=8000", "--output=1000", "--kv-cache-gib=2", "--document-tokens=30001"])
    assert "what prompts\nfind of these depends on the text after them." in capsys.readouterr().out


def test_copies_of_a_model_share_the_gpus_of_a_fleet(plan, capsys, llama_8b):
    assert plan(llama_8b, gpu_gib=80)["num_replicas"] is None
    assert plan(llama_8b, gpu_gib=80, gpus=12, tensor_parallel_size=4)["num_replicas"] == 3
    cli.plan([llama_8b, "--context=8000", "--output=1000", "--gpu-gib=80", "--gpus=4", "--tensor-parallel-size=4"])
    assert "\n4 GPUs, 1 copy of the model\n" in capsys.readouterr().out


def test_pipeline_ranks_share_layers_and_weights(plan, llama_8b):
    one, two = (plan(llama_8b, gpu_gib=80, full_layers="", pipeline_parallel_size=size) for size in (1, 2))
    for name in ("stock", "vllm-l2kv"):
        assert engine_of(two, name)["block_bytes"] == engine_of(one, name)["block_bytes"] // 2
        assert engine_of(two, name)["groups"] == engine_of(one, name)["groups"]
        assert row_of(two, name, 1)["memory_ratio"] == 1
    assert two["bytes_per_token"]["full_attention"] == one["bytes_per_token"]["full_attention"] // 2
    assert two["memory_of_a_gpu"]["weights_gib"] == one["memory_of_a_gpu"]["weights_gib"] / 2
    assert engine_of(two, "stock")["num_blocks"] > 2 * engine_of(one, "stock")["num_blocks"], "weights leave more room"
    fleet = plan(llama_8b, gpu_gib=80, pipeline_parallel_size=2, tensor_parallel_size=2, gpus=12)
    assert (fleet["num_gpus"], fleet["num_replicas"]) == (4, 3)


def test_the_rank_with_the_largest_blocks_limits_a_pipeline(plan, llama_8b):
    """With layers 0 and 1 full the first rank has 14 compressed layers, the second 16 and none of the full ones."""
    two = engine_of(plan(llama_8b, kv_cache_gib=16, pipeline_parallel_size=2), "vllm-l2kv")
    assert [(group["kind"], group["layers"]) for group in two["groups"]] == [("full", 2), ("compressed", 30)]
    assert two["block_bytes"] == 16 * 16 * 8 * 2 * 128 * 2
    assert two["num_blocks"] == 2**34 // two["block_bytes"]


def test_documents_are_not_mentioned_without_the_option(capsys, plan, llama_8b):
    assert "documents" not in row_of(plan(llama_8b, kv_cache_gib=16), "vllm-l2kv", 0.25)
    cli.plan([llama_8b, "--context=8000", "--output=1000", "--kv-cache-gib=16"])
    assert "ocument" not in capsys.readouterr().out.replace("docs/sizing.md", "")


def test_the_table(capsys, llama_8b):
    cli.plan([llama_8b, "--gpu-gib", "80", "--context", "8000", "--output", "1000", "--budgets", "1024"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    header = next(line for line in lines if line.startswith("engine"))
    assert header.split() == list(chain.from_iterable(map(str.split, COLUMNS)))
    assert [line.split()[:2] for line in lines if line.startswith(("stock ", "vllm-l2kv "))] == [
        ["stock", "1"],
        ["vllm-l2kv", "1"],
        ["vllm-l2kv", "0.5"],
        ["vllm-l2kv", "0.25"],
        ["vllm-l2kv", "budget"],
    ]
    assert "vllm-l2kv  budget 1,024  1,024 " in out
    assert "14.96 GiB of weights, by parameters counted by the config" in out
    assert "2 full layers x 240 tokens, 30 compressed layers x 16 tokens" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--gpu-gib or --kv-cache-gib must be given: how much memory there is"),
        (["--device", "cpu", "--gpu-gib", "8"], "--kv-cache-gib must be given: how much memory there is"),
        (["--gpu-gib", "0"], "argument --gpu-gib: G must be a number with 0 < G, got 0"),
        (["--gpu-gib", "80", "--overhead-gib", "-1"], "argument --overhead-gib: G must be a number with 0 <= G"),
        (["--gpu-gib", "80", "--gpu-memory-utilization", "2"], "--gpu-memory-utilization: R must satisfy 0 < R <= 1"),
        (["--gpu-gib", "80", "--context", "0"], "argument --context: N must satisfy 1 <= N <= 2147483647, got 0"),
        (["--gpu-gib", "80", "--ratio", "0.5,0"], "argument --ratio: R must satisfy 0 < R <= 1, got 0"),
        (["--gpu-gib", "80", "--full-layers", "40"], "full_layers names layer 40"),
        (["--gpu-gib", "80", "--budgets", "0"], "argument --budgets: N must satisfy 1 <= N"),
        (
            ["--gpu-gib", "80", "--budgets", "67"],
            "must be at least kv_protect_first + kv_protect_last = 68",
        ),
        (["--gpu-gib", "80", "--answer-interval", "0"], "argument --answer-interval: N must satisfy 1 <= N"),
        (["--gpu-gib", "80", "--document-tokens", "0"], "argument --document-tokens: N must satisfy 1 <= N"),
        (["--gpu-gib", "80", "--kv-memory", "0.5"], "give its file too (--kv-profile FILE)"),
        (["--gpu-gib", "80", "--kv-scorer", "l2"], "a scorer (--kv-scorer) chooses among the settings of a profile"),
        (["--gpu-gib", "80", "--kv-profile", "no/such"], "argument --kv-profile: cannot read the profile no/such"),
        (["--gpu-gib", "16"], "the KV cache must have at least two blocks, got -3.24 GiB"),
        (["--gpu-gib", "80", "--kv-cache-dtype", "int8"], "--kv-cache-dtype: invalid choice: 'int8'"),
        (["--gpu-gib", "80", "--tensor-parallel-size", "3"], "--tensor-parallel-size must divide"),
        (
            ["--gpu-gib", "80", "--tensor-parallel-size", "4", "--gpus", "10"],
            "a multiple of the 4 GPUs that share the model",
        ),
        (["--gpu-gib", "80", "--pipeline-parallel-size", "33"], "leave a layer with a cache to each rank"),
    ],
)
def test_errors_are_one_line(capsys, llama_8b, words, message):
    with pytest.raises(SystemExit) as caught:
        cli.plan([llama_8b, "--context", "8000", "--output", "1000", *words])
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("vllm-l2kv plan: error: ")
    assert message in line
    assert line.count("\n") == 1


def test_nothing_but_the_plan_is_printed(llama_8b, tmp_path):
    """Runs in a separate process, where the command imports vLLM."""

    def run(model: str) -> subprocess.CompletedProcess[str]:
        words = ["plan", model, "--gpu-gib", "80", "--context", "8000", "--output", "1000", "--json"]
        return subprocess.run([sys.executable, "-m", "vllm_l2kv.cli", *words], capture_output=True, text=True)

    assert json.loads(run(llama_8b).stdout)["model"] == llama_8b
    failed = run(str(tmp_path / "none"))
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "error: cannot read the config of" in failed.stderr.splitlines()[-1]
    assert "Error parsing config" not in failed.stderr


def test_the_default_is_vllms():
    assert CacheConfig().gpu_memory_utilization == cli.UTILIZATION


class TestDocumentation:
    """docs/sizing.md shows the command's output."""

    text = (Path(__file__).parents[2] / "docs/sizing.md").read_text()

    @pytest.mark.parametrize("measured", MEASURED, ids=named)
    def test_rows(self, plan, llama_8b, measured):
        result = plan(llama_8b, kv_cache_gib=16, ratio="0.5,0.25,0.1", kv_cache_dtype=measured["kv_cache_dtype"])
        name = "stock" if measured["engine"] == "stock" else "vllm-l2kv"
        row = row_of(result, name, measured["keep_ratio"])
        kind = "bf16" if measured["kv_cache_dtype"] == "auto" else measured["kv_cache_dtype"]
        cells = (name, kind, row["keep_ratio"], measured["mean_running"], row["on_average"], row["at_once"])
        assert f"| {' | '.join(map(str, cells))} |" in self.text

    def test_the_example(self, capsys, llama_8b):
        cli.plan([llama_8b, "--gpu-gib", "80", "--context", "8000", "--output", "1000", "--budgets", "1024,4096"])
        assert capsys.readouterr().out.replace(llama_8b, "Llama-3.1-8B") in self.text

    def test_the_example_of_documents(self, capsys, llama_8b):
        cli.plan([llama_8b, *DOCUMENTS.split()])
        out = capsys.readouterr().out.replace(llama_8b, "Llama-3.1-8B")
        table = out[out.index("Documents of") : out.index("\n\nstock: ")]
        assert f"plan Llama-3.1-8B {DOCUMENTS}\n...\n{table}\n..." in self.text

    @pytest.mark.parametrize("num_gpus", [1, 10, 1000])
    def test_a_fleet(self, capsys, llama_8b, num_gpus):
        """The table of docs/operating.md."""
        text = (Path(__file__).parents[2] / "docs/operating.md").read_text()
        (words,) = re.findall(r"^\$ \.venv/bin/vllm-l2kv plan MODEL (.*) --gpus 10$", text, re.MULTILINE)
        cli.plan([llama_8b, *words.split(), "--gpus", str(num_gpus)])
        fleet = capsys.readouterr().out.split("of the model\n")[1].split("\n\n")[0].splitlines()
        (stock, _, half, quarter) = ([line.split()[place] for place in (2, 4)] for line in fleet[1:])
        cells = [", ".join(counts) for counts in zip(stock, half, quarter, strict=True)]
        assert f"| {num_gpus:,} | {' | '.join(cells)} |" in text

    def test_memory_of_requests_about_one_document(self, plan, llama_8b):
        """The table of docs/choosing.md, from the blocks of the plan."""
        result = plan(llama_8b, kv_cache_gib=16, protect="4:64", document_tokens=DOCUMENT)
        stock, ours = (engine_of(result, name) for name in ("stock", "vllm-l2kv"))
        ((s,), (full, compressed)) = ([group["block_size"] for group in engine["groups"]] for engine in (stock, ours))
        document = row_of(result, "vllm-l2kv", 0.25)
        rows, q = document["document_rows"], QUESTION + ANSWER
        private_rows = math.ceil((DOCUMENT + QUESTION) / 4) + ANSWER
        private = -(-private_rows // compressed) - (-(DOCUMENT + q) // full)
        # Whole blocks of the document are shared; the question begins in a copy of the last one.
        question = sum(-(-(held + q) // size) - held // size for held, size in ((rows, compressed), (DOCUMENT, full)))
        for k in (1, 8, 32):
            blocks = {
                "stock": (-(-DOCUMENT // s) + k * -(-q // s)) * stock["block_bytes"],
                "private": k * private * ours["block_bytes"],
                "document": (document["document_blocks"] + k * question) * ours["block_bytes"],
            }
            cells = " | ".join(f"{num_bytes / 2**30:.2f}" for num_bytes in blocks.values())
            assert f"| {k} | {cells} |" in CHOOSING.read_text()

    def test_blocks_of_a_whole_h100(self, plan, llama_8b):
        planned = engine_of(plan(llama_8b, gpu_gib=80), "stock")["num_blocks"]
        assert f"{MEASURED[0]['num_blocks']:,} blocks, {planned:,} are planned" in " ".join(self.text.split())
