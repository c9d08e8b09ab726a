"""Writes the tables and plots of docs/quality.md from the rows in benchmarks/quality/results.

python benchmarks/quality/tables.py
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from grid import MAIN_LAYERS

from vllm_l2kv.tools.evaluation.cli import ROWS
from vllm_l2kv.tools.evaluation.report import METRICS, estimates, label, with_excess_loss
from vllm_l2kv.tools.evaluation.rows import read_rows
from vllm_l2kv.tools.evaluation.statistics import Estimate

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
DOCUMENT = ROOT / "docs" / "quality.md"
LAYER_RATIOS = (0.5, 0.25)
TASKS = {"perplexity": "excess loss", "passkey": "score", "needle": "score", "ruler": "score"}
SHOWN = {"excess loss": "excess loss in nats a token, less is better", "score": "score from 0 to 1, more is better"}
Row = dict[str, Any]


def main() -> None:
    """Replaces what stands between the marks of each model."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        rows = {task: with_excess_loss(read_rows(folder / task / ROWS)) for task in TASKS}
        begin, end = f"<!-- {folder.name}: benchmarks/quality/tables.py -->", f"<!-- end of {folder.name} -->"
        made = "\n\n".join(section for section in sections(rows) if section)
        text, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{made}\n{end}", text, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise SystemExit(f"{DOCUMENT} must hold the marks of {folder.name} once.")
    DOCUMENT.write_text(text, encoding="utf-8")


def sections(rows: dict[str, list[Row]]) -> Iterable[str]:
    """Every scorer by task and length, then full layers."""
    for task, metric in TASKS.items():
        main = [row for row in rows[task] if row["full_layers"] == MAIN_LAYERS]
        if len({row["scorer"] for row in main}) > 1:
            for length in sorted({row["length"] for row in main}):
                measured = [row for row in main if row["length"] == length]
                yield f"**{task}**, {SHOWN[metric]}; {samples(measured)}:\n\n{by_scorer(measured, task, metric)}"
    yield from by_layers(rows)


def samples(rows: Sequence[Row]) -> str:
    """How many prompts of which lengths."""
    prompts = {(row["length"], row.get("depth"), row.get("subtask"), row["sample"]) for row in rows}
    lengths = sorted({row["length"] for row in rows})
    baseline = [row for row in rows if row["keep_ratio"] == 1]
    metric = "loss" if "loss" in baseline[0] else "score"
    mean = sum(row[metric] for row in baseline) / len(baseline)
    return (
        f"{len(prompts)} prompts of {' and '.join(map(str, lengths))} tokens, {metric} without compression {mean:.2f}"
    )


def by_scorer(rows: Sequence[Row], task: str, metric: str) -> str:
    """Lines are variants, columns keep ratios."""
    entries = [entry for entry in estimates(rows, task) if entry["keep_ratio"] < 1]
    ratios = sorted({entry["keep_ratio"] for entry in entries}, reverse=True)
    cells = {(label(entry), entry["keep_ratio"]): shown(entry[metric]) for entry in entries}
    names = sorted({name for name, _ in cells}, key=lambda name: ("+" in name, name))
    return table(
        ["keep ratio", *map(str, ratios)], [[name, *(cells[name, ratio] for ratio in ratios)] for name in names]
    )


def by_layers(rows: dict[str, list[Row]]) -> Iterable[str]:
    """`l2` with other full layers, at the length that all of them were measured at; a table for each ratio."""
    sets = sorted({tuple(row["full_layers"]) for row in rows["passkey"]})
    length = min(row["length"] for row in rows["passkey"])
    cells = {
        (tuple(layers), entry["protect_first"] > 0, task, entry["keep_ratio"]): shown(entry[metric])
        for task, metric in TASKS.items()
        for layers in sets
        for entry in estimates(
            [r for r in rows[task] if (tuple(r["full_layers"]), r["length"]) == (layers, length)], task
        )
        if (entry["scorer"], entry["granularity"]) == ("l2", "token")
    }
    for ratio in LAYER_RATIOS:
        lines = [
            [
                f"{{{', '.join(map(str, layers))}}}{' +4/64' if protected else ''}",
                *(cells[layers, protected, task, ratio] for task in TASKS),
            ]
            for layers in sets
            for protected in (False, True)
        ]
        heads = [f"{task}, {metric}" for task, metric in TASKS.items()]
        yield f"**Full layers**, `l2` at {ratio}, {length} tokens:\n\n" + table(["full layers", *heads], lines)


def shown(estimate: Estimate) -> str:
    """Mean and interval."""
    return f"{estimate.mean:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


if __name__ == "__main__":
    assert set(TASKS) == set(METRICS)
    main()
