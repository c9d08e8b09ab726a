"""Writes the tables of docs/reliability.md from benchmarks/reliability/results.

python -m benchmarks.reliability.tables
"""

import re
from pathlib import Path
from typing import Any

from benchmarks.quality.tables import table
from vllm_l2kv.tools.evaluation.rows import read_rows

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def main() -> None:
    """Writes the page again."""
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(text: str) -> str:
    """Returns the page with the text between each pair of marks replaced.

    Raises:
        ValueError: The page lacks a mark, or has it twice.
    """
    for name, made in {"churn": churn(), "faults": faults(), "starts": starts()}.items():
        begin, end = f"<!-- {name}: benchmarks/reliability/tables.py -->", f"<!-- end of {name} -->"
        before, *after = re.split(f"{begin}.*?{end}", text, flags=re.DOTALL)
        if len(after) != 1:
            raise ValueError(f"{PAGE} must hold the marks of {name} once.")
        text = f"{before}{begin}\n{made}\n{end}{after[0]}"
    return text


def churn() -> str:
    """Returns a line for each run: sums of its phases, and the server's memory after the first and the last of them."""
    lines = []
    for name, command in {"churn": "`make test`", "soak": "`make soak`"}.items():
        phases = read(name)
        requests, seconds, preemptions, complete = (
            sum(phase[key] for phase in phases) for key in ("requests", "seconds", "preemptions", "complete")
        )
        first, before, last = (phases[i]["mib"] for i in (0, -2, -1))
        growth = f"{last - before:.1f} MiB in the last {phases[-1]['requests']:,} requests"
        counts = [f"{requests:,}", f"{complete:,}", f"{seconds:,.0f} s", f"{preemptions:,}"]
        lines.append([command, *counts, f"{first:,.0f} to {last:,.0f} MiB", growth])
    head = ["run", "requests", "whole answers", "time", "preemptions", "memory of all processes", "growth at the end"]
    return table(head, lines)


def faults() -> str:
    """Returns a line for each fault, with what clients got and how many of them."""
    lines = []
    for row in read("faults"):
        outcomes = ", ".join(f"{count} x {what}" for what, count in sorted(row["outcomes"].items()))
        lines.append([row["fault"], f"{row['seconds']:.1f} s", str(row["status"]), outcomes])
    return table(["fault", "gone after", "status", "clients got"], lines)


def starts() -> str:
    """Returns a line for each start that failed."""
    rows = read("starts")
    return table(
        ["start", "gone after", "status"],
        [[row["start"], f"{row['seconds']:.1f} s", str(row["status"])] for row in rows],
    )


def read(name: str) -> list[Any]:
    """Returns the rows of a file of results."""
    return read_rows(RESULTS / f"{name}.jsonl")


if __name__ == "__main__":
    main()
