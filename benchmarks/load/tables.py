"""Writes the table of docs/load_testing.md from the rows in benchmarks/load/results.

python -m benchmarks.load.tables
"""

import json
import re
from pathlib import Path
from typing import Any

from vllm_l2kv.tools.bench.report import comparison, table
from vllm_l2kv.tools.bench.servers import OURS, STOCK

ROOT = Path(__file__).parents[2]
ROWS = Path(__file__).parent / "results" / "cpu.jsonl"
DOCUMENT = ROOT / "docs" / "load_testing.md"
BEGIN, END = "<!-- table: benchmarks/load/tables.py -->", "<!-- end of table -->"
SHOWN = (
    "output tok/s",
    "first token, p50 (ms)",
    "inter-token, p50 (ms)",
    "per output token, p50 (ms)",
    "end to end, p50 (ms)",
    "end to end, p95 (ms)",
    "requests running, mean",
    "requests waiting, mean",
    "KV cache in use, mean (%)",
    "preemptions",
    "rows evicted",
)


def main() -> None:
    """Replaces the text between the marks."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    text, count = re.subn(
        f"{BEGIN}.*?{END}",
        lambda _: f"{BEGIN}\n{about(rows[0])}\n\n{made(rows)}\n{END}",
        DOCUMENT.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"{DOCUMENT} must hold the marks once.")
    DOCUMENT.write_text(text, encoding="utf-8")


def about(row: dict[str, Any]) -> str:
    """What was measured on what."""
    load = row["load"]
    return (
        f"{row['machine']}, vLLM {row['vllm']}, `{row['options']}`.\n{load['until']} of {load['arrivals']}, prompts of "
        f"{load['prompt_tokens']} tokens, answers of {load['output_tokens']}, seed {load['seed']}."
    )


def made(rows: list[dict[str, Any]]) -> str:
    """Lines are metrics, columns rounds: vllm-l2kv, stock vLLM, and the first divided by the second."""
    ours, stock, quotients = ({line[0]: line[1:] for line in lines} for lines in (*both(rows), comparison(rows)))
    lines = [["vllm-l2kv, stock (ratio)", *ours[""]], ["---"] * (1 + len(ours[""]))]
    for name in SHOWN:
        nothing = ["-"] * len(ours[""])
        cells = zip(ours.get(name, nothing), stock.get(name, nothing), quotients.get(name, nothing), strict=True)
        lines.append([name, *(f"{a}, {b} ({c})" if c != "-" else f"{a}, {b}" for a, b, c in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def both(rows: list[dict[str, Any]]) -> list[list[list[str]]]:
    """Tables of both engines."""
    return [table(rows, engine) for engine in (OURS, STOCK)]


if __name__ == "__main__":
    main()
