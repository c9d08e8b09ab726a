"""Writes the tables of docs/load_testing.md and, about routers, of docs/operating.md from benchmarks/load/results.

python -m benchmarks.load.tables
"""

import json
import re
from pathlib import Path
from typing import Any

from vllm_l2kv.tools.bench.report import comparison, table
from vllm_l2kv.tools.bench.servers import OURS, STOCK

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
DOCS = ROOT / "docs"
BEGIN, END = "<!-- table: benchmarks/load/tables.py -->", "<!-- end of table -->"
SHOWN = (
    "output tok/s",
    "first token, p50 (ms)",
    "inter-token, p50 (ms)",
    "end to end, p50 (ms)",
    "requests running, mean",
    "preemptions",
    "rows evicted",
)


def main() -> None:
    """Replaces the text between the marks of each page."""
    for page, text_of in {"load_testing.md": of_load, "operating.md": of_routers}.items():
        path = DOCS / page
        text, count = re.subn(
            f"{BEGIN}.*?{END}",
            lambda _, text_of=text_of: f"{BEGIN}\n{text_of()}\n{END}",
            path.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        if count != 1:
            raise SystemExit(f"{path} must hold the marks once.")
        path.write_text(text, encoding="utf-8")


def read(name: str) -> list[dict[str, Any]]:
    """Returns the rows of a file of results."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def of_load() -> str:
    """Returns the table that compares vllm-l2kv with stock vLLM."""
    rows = read("cpu.jsonl")
    return f"{about(rows[0])}\n\n{made(rows)}"


def of_routers() -> str:
    """Returns the table of a router's policies: a line for each policy, a column for each way to serve a document."""
    rows = {(row["policy"], row["way"]): row for row in read("routing.jsonl")}
    policies, ways = ({key[i]: None for key in rows} for i in range(2))
    any_row = next(iter(rows.values()))
    lines = [["policy", *(f"{way}: found, busiest replica" for way in ways)], ["---"] * (1 + len(ways))]
    lines += [[f"`{policy}`", *(shown(rows[policy, way]) for way in ways)] for policy in policies]
    about = (
        f"{len(any_row['requests_of_replicas'])} replicas of the demo model on {any_row['machine']}, vllm-router "
        f"{any_row['router']}, `{any_row['options']}`.\n{any_row['num_documents']} documents, "
        f"{any_row['num_questions']} questions about each in an order of chance, three clients."
    )
    return f"{about}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(row: dict[str, Any]) -> str:
    """Returns the share of prompt tokens found in a cache, and the share of requests at the busiest replica."""
    requests = row["requests_of_replicas"]
    return f"{row['found_tokens'] / row['prompt_tokens']:.2f}, {max(requests) / sum(requests):.2f}"


def about(row: dict[str, Any]) -> str:
    """Returns the machine, the version, the options and the load as text."""
    load = row["load"]
    return (
        f"{row['machine']}, vLLM {row['vllm']}, `{row['options']}`.\n{load['until']} of {load['arrivals']}, prompts of "
        f"{load['prompt_tokens']} tokens, answers of {load['output_tokens']}, seed {load['seed']}."
    )


def made(rows: list[dict[str, Any]]) -> str:
    """Returns a table: a line for each metric, a column for each round; cells have vllm-l2kv, stock vLLM and ratio."""
    ours, stock, quotients = ({line[0]: line[1:] for line in lines} for lines in (*both(rows), comparison(rows)))
    lines = [["vllm-l2kv, stock (ratio)", *ours[""]], ["---"] * (1 + len(ours[""]))]
    for name in SHOWN:
        nothing = ["-"] * len(ours[""])
        cells = zip(ours.get(name, nothing), stock.get(name, nothing), quotients.get(name, nothing), strict=True)
        lines.append([name, *(f"{a}, {b} ({c})" if c != "-" else f"{a}, {b}" for a, b, c in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def both(rows: list[dict[str, Any]]) -> list[list[list[str]]]:
    """Returns the tables of both engines."""
    return [table(rows, engine) for engine in (OURS, STOCK)]


if __name__ == "__main__":
    main()
