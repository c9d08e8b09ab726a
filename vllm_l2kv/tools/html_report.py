"""Plots, and the one HTML file that holds them."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPORT = "report.html"


def figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    """A figure of matplotlib with one pair of axes."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return drawn, axes


def save(drawn: Any, axes: Any, path: Path) -> Path:
    """Writes a figure of `figure` with its legend."""
    axes.legend(fontsize=6, ncols=2)
    drawn.savefig(path, dpi=110)
    return path


def embedded(path: Path, caption: str = "") -> dict[str, str]:
    """A plot as sections hold it; the caption says how to read it."""
    return {"name": path.stem, "caption": caption, "data": base64.b64encode(path.read_bytes()).decode()}


def write_html(title: str, sections: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Writes the file, which needs no other.

    Args:
        title: Heading of the page.
        sections: Each with a `title`, and some of `note` (one paragraph), `plots` (of `embedded`), `text` (shown as it
            is) and `table` (lines of words, the first one a heading).
        folder: Where it goes.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("vllm_l2kv.tools", "templates"), autoescape=True)
    path = folder / REPORT
    path.write_text(environment.get_template(REPORT).render(title=title, sections=sections), encoding="utf-8")
    return path
