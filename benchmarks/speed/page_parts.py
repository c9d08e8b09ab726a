"""Text, tables and plots of the pages, and the rows that they show."""

import json
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "vllm-l2kv"  # the same rows make the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PLOTS = ROOT / "docs" / "img"
GIB = 2**30
Row = dict[str, Any]
AS_IT_IS = ("#", "|", "!", "    ")
"""How headings, tables, pictures and code begin."""


def read(name: str, must_exist: bool = True) -> list[Row]:
    """Returns the rows of one result file; none for a missing file that need not exist."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if must_exist or file.exists() else []


def provenance(rows: list[Row]) -> str:
    """Returns what measured rows were measured on."""
    return f"{values_of(rows, 'gpu')}, vLLM {values_of(rows, 'vllm')}, commit {values_of(rows, 'commit')}."


def values_of(rows: list[Row], name: str) -> str:
    """Returns the distinct values of a field in all rows."""
    return ", ".join(dict.fromkeys(row[name] for row in rows))


def table(head: str, lines: Iterable[Iterable[Any]]) -> str:
    """Returns a Markdown table; each word of the head names a column, with commas for spaces."""
    columns = [word.replace(",", " ") for word in head.split()]
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)


def filled(page: str) -> str:
    """Returns a Markdown page with paragraphs and items of lists wrapped at 120 characters."""
    return "\n\n".join(_filled(block) for block in page.strip("\n").split("\n\n")) + "\n"


def _filled(block: str) -> str:
    if block.startswith(AS_IT_IS):
        return block
    mark = "- " if block.startswith("- ") else ""
    parts = block.removeprefix(mark).split(f"\n{mark}") if mark else [block]
    indent = " " * len(mark)
    lines = {"width": 120, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(part, initial_indent=mark, subsequent_indent=indent, **lines) for part in parts)


@contextmanager
def plot(name: str, **labels: Any) -> Iterator[Axes]:
    """Yields axes to draw on and saves the plot; labels are arguments of `Axes.set`."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    yield axes
    axes.set(**labels)
    axes.legend()
    figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
