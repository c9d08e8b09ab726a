"""Writes docs/benchmarks.md from the rows in benchmarks/speed/results.

python benchmarks/speed/tables.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

TEMPLATE = """# Benchmarks

Made by `python benchmarks/speed/tables.py` from the rows in `benchmarks/speed/results`; each row names its GPU, vLLM
version and commit. The shape is that of Llama-3.1-8B with made-up weights, bf16.

## Decode step

    PYTHONPATH=. python benchmarks/speed/steps.py --model FOLDER_WITH_CONFIG_JSON --out h100_steps.jsonl

{gpu}, vLLM {vllm}. Median of {num_steps} steps in which the whole batch decodes, milliseconds; requests x prompt
tokens, then the keep ratio if there is one. Async scheduling, prefix caching and full CUDA graphs are on in both.
Stock vLLM is compared with the same case uncompressed.

{steps}

## A cache too small for its requests

    PYTHONPATH=. python benchmarks/speed/memory_bound.py --model FOLDER_WITH_CONFIG_JSON --out h100_memory_bound.jsonl

16 GiB of KV cache; 48 prompts of 8,000 tokens at once, 400 generated tokens each. Running: median of the steps in which
others wait. At 0.1 all requests are admitted as fast as they are prefilled, so that median says little.

{memory}

## Compaction alone

    PYTHONPATH=. python benchmarks/speed/compaction.py --out h100_compaction.jsonl

All 30 compressed layers of one or eight prompts, beside a device-to-device copy of the bytes that must be touched (keys
read once, kept rows read and written). The multiple that we owe is 2.

{compaction}
"""


def main() -> None:
    """Writes the page."""
    names = ("h100_steps.jsonl", "h100_memory_bound.jsonl", "h100_compaction.jsonl")
    steps, memory, compaction = (read(name) for name in names)
    page = TEMPLATE.format(
        gpu=steps[0]["gpu"],
        vllm=steps[0]["vllm"],
        num_steps=steps[0]["num_steps"],
        steps=step_table(steps),
        memory=memory_table(memory),
        compaction=compaction_table(compaction),
    )
    (ROOT / "docs" / "benchmarks.md").write_text(page)


def read(name: str) -> list[Row]:
    """The rows of one result file."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def step_table(rows: list[Row]) -> str:
    """One line a case."""
    stock = {row["case"]: row["median_step_ms"] for row in rows if row["engine"] == "stock"}
    lines = ["| case | stock | vllm-l2kv | ratio |", "|---|---|---|---|"]
    for row in rows:
        if row["engine"] == "l2kv":
            base = stock[row["case"].split("@")[0]]
            ours = row["median_step_ms"]
            lines.append(f"| {row['case']} | {base:.2f} | {ours:.2f} | {ours / base:.3f} |")
    return "\n".join(lines)


def memory_table(rows: list[Row]) -> str:
    """One line a run."""
    lines = [
        "| engine | keep ratio | running | peak | output tok/s | median first token, s | preemptions |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        running = f"{row['median_running_while_others_wait']:g} | {row['peak_running']}"
        speed = f"{row['output_tokens_per_s']:,.0f} | {row['median_first_token_s']} | {row['preemptions']}"
        lines.append(f"| {row['engine']} | {row['keep_ratio']} | {running} | {speed} |")
    return "\n".join(lines)


def compaction_table(rows: list[Row]) -> str:
    """One line a measurement."""
    lines = ["| prompts x tokens | keep ratio | microseconds | copy | multiple |", "|---|---|---|---|---|"]
    for row in rows:
        size = f"{row['num_prompts']} x {row['num_prompt_tokens']:,}"
        lines.append(f"| {size} | {row['keep_ratio']} | {row['us']:,.0f} | {row['copy_us']:,.0f} | {row['multiple']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
