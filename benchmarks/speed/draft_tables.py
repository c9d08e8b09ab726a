"""The section of docs/benchmarks.md about speculative decoding."""

from typing import Any

from benchmarks.speed.page_parts import Row, provenance, table

SECTION = """
## Speculative decoding

Decode steps with {num_drafts} drafts each; `of stock` is the ratio to stock vLLM without drafts. `model`: the model
drafts for itself, on its whole cache, which makes nothing fast and shows what a draft model costs. {ngrams}{dummy}The
median of {num_runs} runs, and the slowest and fastest: steps of a small model take as long as the host needs to launch
them. {about}

{table}

Rows: `h100_drafts.jsonl`, by

    python -m benchmarks.speed.drafts --model MODEL --text FILE --out h100_drafts.jsonl{dummy_command}
"""
NGRAMS = "`n-grams`: of the request's own tokens. "
DUMMY = "With made-up weights the share of accepted drafts means nothing. "
DUMMY_COMMAND = """
    python -m benchmarks.speed.drafts --model FOLDER_WITH_CONFIG_JSON --dummy --out h100_drafts.jsonl"""
DRAFTERS = {"": "none", "model": "model", "ngrams": "n-grams"}
"""Endings of variants' names, and their names in the table."""


def drafts_section(rows: list[Row]) -> str:
    """Returns the section; empty without rows.

    Args:
        rows: Rows of `drafts.py`.
    """
    if not rows:
        return ""
    num_runs = len(rows[0]["tokens_per_s_of_runs"])
    is_dummy = any(row["dummy"] for row in rows)
    return SECTION.format(
        num_drafts=rows[0]["num_drafts"],
        num_runs=num_runs,
        about=provenance(rows),
        ngrams=NGRAMS if any(row["variant"].endswith("_ngrams") for row in rows) else "",
        dummy=DUMMY if is_dummy else "",
        dummy_command=DUMMY_COMMAND if is_dummy else "",
        table=drafts_table(rows),
    )


def drafts_table(rows: list[Row]) -> str:
    """Returns a table with a line for each model, engine, drafter and keep ratio."""
    stock = {load_of(row): row["tokens_per_s"] for row in rows if row["variant"] == "stock"}
    lines: list[list[Any]] = []
    for row in rows:
        drafter = DRAFTERS[row["variant"].partition("_")[2]]
        what = [*load_of(row), row["engine"], drafter, 1.0 if row["ratio"] is None else row["ratio"]]
        speed, base = row["tokens_per_s"], stock.get(load_of(row))
        accepted = "" if row["accepted"] is None else f"{row['accepted']:.0%}"
        runs = row["tokens_per_s_of_runs"]
        speeds = [f"{speed:,.0f}", f"{min(runs):,.0f} to {max(runs):,.0f}", f"{speed / base:.2f}" if base else ""]
        speeds.append(f"{row['median_step_ms']:.2f}")
        lines.append([*what, *speeds, row["tokens_per_request_and_step"], accepted, row["held_blocks"]])
    measured = "output,tok/s runs of,stock step,(ms) tokens,a,step accepted blocks"
    return table(f"model load engine drafts keep,ratio {measured}", lines)


def load_of(row: Row) -> tuple[str, str]:
    """Returns the model, and its requests x prompt tokens; rows of one load are compared."""
    return f"{row['model']}{', made-up weights' if row['dummy'] else ''}", row["load"]
