"""Writes the tables of docs/quality_tables.md and docs/quality.md from the aggregates in benchmarks/quality/results.

python -m benchmarks.quality.tables
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.aggregate import AGGREGATES, RESULTS
from benchmarks.quality.grid import MAIN_LAYERS, RATIOS
from vllm_l2kv.tools.evaluation.aggregates import estimates, grouped, is_whole, moments_of, num_prompts
from vllm_l2kv.tools.evaluation.report import by_amount, conditions
from vllm_l2kv.tools.evaluation.rows import read_rows
from vllm_l2kv.tools.evaluation.statistics import Estimate

ROOT = Path(__file__).parents[2]
DOCUMENTS = {name: ROOT / "docs" / f"{name}.md" for name in ("quality_tables", "quality")}
LONG_ANSWERS = "long_answers"
"""Results of the task `copy`, in the text of docs/quality.md."""
LAYER_RATIOS = (0.5, 0.25)
TASKS = {"perplexity": "excess loss", "passkey": "score", "needle": "score", "ruler": "score"}
SHOWN = {"excess loss": "excess loss in nats a token, less is better", "score": "score from 0 to 1, more is better"}
Row = dict[str, Any]


def main() -> None:
    """Writes the pages again."""
    for page, path in DOCUMENTS.items():
        path.write_text(with_tables(page, path.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(page: str, text: str) -> str:
    """A page, with the text between the marks of each of its results replaced."""
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        is_long = folder.name == LONG_ANSWERS
        if is_long != (page == "quality"):
            continue
        cells = read_rows(folder / AGGREGATES)
        begin, end = f"<!-- {folder.name}: benchmarks/quality/tables.py -->", f"<!-- end of {folder.name} -->"
        made = "\n\n".join(long_answers(cells) if is_long else sections(cells))
        text, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{made}\n{end}", text, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise SystemExit(f"{DOCUMENTS[page]} must hold the marks of {folder.name} once.")
    return text


def long_answers(cells: Sequence[Row]) -> Iterable[str]:
    """Where it was measured, then every scorer by ratio and budget."""
    yield conditions(cells)
    for length in sorted({cell["length"] for cell in cells}):
        measured = [cell for cell in cells if cell["length"] == length]
        yield f"Share of items right; {samples(measured)}:\n\n{by_scorer(measured, 'copy', 'score')}"


def sections(cells: Sequence[Row]) -> Iterable[str]:
    """Where it was measured, every scorer by task and length, then full layers."""
    yield provenance(cells)
    for task, metric in TASKS.items():
        main = [cell for cell in cells if (cell["task"], cell["full_layers"]) == (task, MAIN_LAYERS)]
        for length in sorted({cell["length"] for cell in main}):
            measured = [cell for cell in main if cell["length"] == length]
            yield f"**{task}**, {SHOWN[metric]}; {samples(measured)}:\n\n{by_scorer(measured, task, metric)}"
    yield from by_layers(cells)


def provenance(cells: Sequence[Row]) -> str:
    """Where rows come from."""
    devices, types, versions, commits = (
        " and ".join(dict.fromkeys(cell[name] for cell in cells)) for name in ("device", "dtype", "vllm", "commit")
    )
    return f"{devices}, {types}, vLLM {versions}, commit {commits}."


def samples(cells: Sequence[Row]) -> str:
    """How many prompts of which length."""
    metric = "loss" if "loss" in cells[0] else "score"
    whole = moments_of((cell for cell in cells if is_whole(cell)), metric)
    return f"{num_prompts(cells)} prompts of {cells[0]['length']} tokens, {metric} without compression {whole.mean:.2f}"


def by_scorer(cells: Sequence[Row], task: str, metric: str) -> str:
    """Lines are variants, columns keep ratios and budgets."""
    amounts, lines = by_amount([entry for entry in estimates(cells, task) if not is_whole(entry)], metric, shown)
    names = sorted(lines, key=lambda name: ("+" in name, name))
    return table(["", *amounts], [[name, *lines[name]] for name in names])


def by_layers(cells: Sequence[Row]) -> Iterable[str]:
    """`l2` with other full layers, at the length that all of them were measured at; a table for each ratio."""
    length = min(cell["length"] for cell in cells)
    kind = (length, "l2", "token")
    chosen = [cell for cell in cells if (cell["length"], cell["scorer"], cell["granularity"]) == kind]
    found = {
        (tuple(layers), entry["protect_first"] > 0, task, entry["keep_ratio"]): shown(entry[TASKS[task]])
        for (layers, task), group in grouped(chosen, "full_layers", "task")
        for entry in estimates(group, task)
    }
    for ratio in LAYER_RATIOS:
        lines = [
            [
                f"{{{', '.join(map(str, layers))}}}{' +4/64' if protected else ''}",
                *(found[layers, protected, task, ratio] for task in TASKS),
            ]
            for layers, protected in sorted({key[:2] for key in found})
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
    assert set(TASKS) == set(RATIOS)
    main()
