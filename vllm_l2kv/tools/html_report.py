"""Plots, and a single HTML file that embeds them."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPORT = "report.html"


def figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    """A matplotlib figure and its axes."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return drawn, axes


def save(drawn: Any, axes: Any, path: Path) -> Path:
    """Adds a legend to a figure from `figure`, and writes it to a file."""
    axes.legend(fontsize=6, ncols=2)
    drawn.savefig(path, dpi=110)
    return path


def embedded(path: Path, caption: str = "") -> dict[str, str]:
    """A plot for the `plots` of a section; the caption says how to read it."""
    return {"name": path.stem, "caption": caption, "data": base64.b64encode(path.read_bytes()).decode()}


def write_html(title: str, sections: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Writes a self-contained HTML file.

    Args:
        title: Heading of the page.
        sections: Each has a `title`, and optionally `note` (one paragraph), `plots` (from `embedded`), `text`
            (preformatted) and `table` (lines of cells, the first one a heading).
        folder: Folder of the file.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("vllm_l2kv.tools", "templates"), autoescape=True)
    path = folder / REPORT
    path.write_text(environment.get_template(REPORT).render(title=title, sections=sections), encoding="utf-8")
    return path
