"""Writes the numbers of docs/quality.md and docs/quality_tables.md, between their marks, from the cells of models.

python -m benchmarks.quality.tables
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.aggregate import AGGREGATES
from benchmarks.quality.cells import CELLS, RESULTS
from benchmarks.quality.pooled import Interval, difference, pooled, retrieval
from benchmarks.quality.settings import MAIN_LENGTH, METHODS, OPTIONS, RETRIEVAL, WHOLE
from vllm_l2kv.tools.evaluation.aggregates import METRICS, estimates, is_whole, moments_of, num_prompts
from vllm_l2kv.tools.evaluation.report import by_amount, conditions
from vllm_l2kv.tools.evaluation.rows import read_rows
from vllm_l2kv.tools.evaluation.statistics import average, moments
from vllm_l2kv.tools.evaluation.variants import QUESTIONS

ROOT = Path(__file__).parents[2]
DOCUMENTS = {name: ROOT / "docs" / f"{name}.md" for name in ("quality", "quality_tables")}
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma-3-270M"}
"""Folders of results, and the names of their models."""
NEIGHBORS = "gemma3_neighbors"
"""Cells of methods with the granularity `neighbors` and without it, in the same engine."""
OTHER_PROMPTS = "smollm2_other_prompts"
"""Cells by prompts of another seed."""
WITH_LEARNED = "smollm2_chosen_with_learned", "smollm2_chosen_with_learned_other_prompts"
"""Cells of a profile from a search that chose full layers and heads with `learned` too."""
LONG_ANSWERS = "long_answers"
"""Aggregates of the task `copy` under budgets."""
SHOWN = {"perplexity": "loss above that of the whole cache in nats a token, lower is better"}
SCORE = "score from 0 to 1, higher is better"
NOTHING_YET = "Not measured, or not to its end."
Row = Mapping[str, Any]


def main() -> None:
    """Writes the pages again."""
    for page, path in DOCUMENTS.items():
        path.write_text(with_tables(page, path.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(page: str, text: str) -> str:
    """Returns a page with the text between each pair of marks replaced.

    Raises:
        ValueError: The page lacks a mark, or has it twice.
    """
    for name, made in _parts(page):
        begin, end = f"<!-- {name}: benchmarks/quality/tables.py -->", f"<!-- end of {name} -->"
        content = "\n\n".join(made) or NOTHING_YET
        text, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise ValueError(f"{DOCUMENTS[page]} must hold the marks of {name} once.")
    return text


def read_cells(name: str) -> list[Row]:
    """Returns the cells of a model; empty if it was not measured."""
    path = RESULTS / name / CELLS
    return list(read_rows(path)) if path.exists() else []


def verdict(cells: Sequence[Row]) -> Iterator[str]:
    """Yields each method's loss of pooled retrieval at the main length, question seen and hidden; or missing tasks."""
    main = [cell for cell in cells if cell["length"] == MAIN_LENGTH]
    whole = retrieval([cell for cell in main if cell["method"] == WHOLE])
    if whole is None:
        missing = sorted(set(RETRIEVAL) - {cell["task"] for cell in main})
        if main:
            yield f"No pooled score: {', '.join(f'`{task}`' for task in missing)} was not measured."
        return
    at = pooled(whole)
    yield (
        f"Pooled retrieval at {MAIN_LENGTH:,} tokens minus that of the whole cache, {_shown(at)}. {num_settings(cells)}"
    )
    for question in QUESTIONS:

        def lost(of: Sequence[Row], whole: Any = whole) -> str:
            scores = retrieval(of)
            return "" if scores is None else _shown(difference(scores, whole), signed=True)

        yield f"Question {question}:\n\n{by_method([c for c in main if c['question'] == question], lost)}"


def num_settings(cells: Sequence[Row]) -> str:
    """How many settings were compared, as a sentence; methods without full layers may share settings and answers."""
    answers = {(setting_of(cell), *(cell[name] for name in ("length", "task", "question"))): cell for cell in cells}
    compared = {setting_of(cell) for cell in cells if cell["method"] != WHOLE}
    lengths, tasks = {cell["length"] for cell in cells}, {cell["task"] for cell in cells}
    num_answers = sum(len(cell["scores"]) for cell in answers.values())
    return (
        f"{len(compared)} settings were compared in {len(tasks)} tasks at {len(lengths)} lengths, by {num_answers:,} "
        "answers; the best of so many look better than they are."
    )


def setting_of(cell: Row) -> tuple[Any, ...]:
    """What the engine and the request were told, whatever the method's name."""
    full = tuple(cell["full_layers"]), cell.get("full_heads", "")
    return *full, cell["keep_ratio"], cell["scorer"], cell.get("granularity", "token")


def tables(cells: Sequence[Row]) -> Iterator[str]:
    """Yields the provenance, the settings, and every task at every length, the main one first."""
    if not cells:
        return
    yield provenance(cells)
    held = f"Settings, and the share of the whole cache that requests of {MAIN_LENGTH:,} tokens held at their end:"
    yield f"{held}\n\n{used(cells)}"
    for length in sorted({cell["length"] for cell in cells}, key=lambda length: (length != MAIN_LENGTH, length)):
        yield f"### {length:,} tokens"
        for task in OPTIONS:
            of_task = [cell for cell in cells if (cell["length"], cell["task"]) == (length, task)]
            if of_task:
                yield f"**{task}**: {samples(of_task)}:"
                yield from task_tables(of_task)


def task_tables(cells: Sequence[Row]) -> Iterator[str]:
    """Yields a table for the question seen and one for the question hidden."""
    task = cells[0]["task"]
    how = next(iter(METRICS[task].values()))
    for question in QUESTIONS:
        asked = [cell for cell in cells if cell["question"] == question and cell["method"] != WHOLE]
        if asked:
            made = by_method(asked, lambda of: "".join(_shown(Interval(*how(moments(c["scores"]))[:3])) for c in of))
            yield f"Question {question}:\n\n{made}" if len({c["question"] for c in cells}) > 1 else made


def by_method(cells: Sequence[Row], shown: Callable[[Sequence[Row]], str]) -> str:
    """Returns a table with a line for each method but the whole cache, and a column for each memory, largest first."""
    compared = [cell for cell in cells if cell["method"] != WHOLE]
    memories = sorted({cell["memory"] for cell in compared}, reverse=True)
    lines = [
        [method, *(shown([c for c in compared if (c["method"], c["memory"]) == (method, m)]) for m in memories)]
        for method in dict.fromkeys(cell["method"] for cell in compared)
    ]
    return table(["", *(f"memory {memory:g}" for memory in memories)], lines)


def used(cells: Sequence[Row]) -> str:
    """Returns full layers, ratio and measured memory, of one method for each source of full layers and heads."""
    first = {of.source: method for method, of in reversed(METHODS.items())}
    main = [cell for cell in cells if cell["length"] == MAIN_LENGTH and cell["method"] in first.values()]

    def words(of: Sequence[Row]) -> str:
        if not of:
            return ""
        full = of[0].get("full_heads") or ", ".join(map(str, of[0]["full_layers"])) or "none"
        held = sum(cell["held"] for cell in of) / len(of)
        return f"full {full}; ratio {of[0]['keep_ratio']:.3f}; held {held:.2f}"

    return by_method(main, words) if main else NOTHING_YET


def samples(cells: Sequence[Row]) -> str:
    """Returns what is counted, and the number of prompts, as text."""
    (whole,) = [cell for cell in cells if cell["method"] == WHOLE]
    task, scores = whole["task"], whole["scores"]
    how = average if task == "perplexity" else next(iter(METRICS[task].values()))
    word = "loss" if task == "perplexity" else "score"
    at = _shown(Interval(*how(moments(scores))[:3]))
    return f"{SHOWN.get(task, SCORE)}; {len(scores)} prompts, {word} with the whole cache {at}"


def provenance(cells: Sequence[Row]) -> str:
    """Returns devices, types, versions and commits of the rows as text."""
    devices, types, versions, commits = (
        " and ".join(dict.fromkeys(cell[name] for cell in cells)) for name in ("device", "dtype", "vllm", "commit")
    )
    return f"{devices}, {types}, vLLM {versions}, commit {commits}."


def long_answers(cells: Sequence[Row]) -> Iterator[str]:
    """Yields the provenance, then every scorer by ratio and budget."""
    yield conditions(cells)
    whole = moments_of((cell for cell in cells if is_whole(cell)), "score")
    length = cells[0]["length"]
    amounts, lines = by_amount(
        [entry for entry in estimates(cells, "copy") if not is_whole(entry)],
        "score",
        lambda estimate: _shown(Interval(*estimate[:3])),
    )
    head = f"{num_prompts(cells)} prompts of {length} tokens, score without compression {whole.mean:.2f}"
    yield f"Share of items that are right; {head}:\n\n{table(['', *amounts], ([n, *lines[n]] for n in sorted(lines)))}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def _parts(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the names of the marks of a page, and the text between them."""
    for name in MODELS:
        yield name, list((verdict if page == "quality" else tables)(read_cells(name)))
    if page == "quality":
        yield NEIGHBORS, list(verdict(read_cells(NEIGHBORS)))
    else:
        for name in (OTHER_PROMPTS, *WITH_LEARNED):
            yield name, list(verdict(read_cells(name)))
        yield LONG_ANSWERS, list(long_answers(read_rows(RESULTS / LONG_ANSWERS / AGGREGATES)))


def _shown(interval: Interval, signed: bool = False) -> str:
    # Adding 0 removes the sign of -0.00, which looks like a loss.
    form = "+.2f" if signed else ".2f"
    value, low, high = (f"{round(number, 2) + 0.0:{form}}" for number in interval)
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    main()
