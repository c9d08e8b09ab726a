"""Draws docs/img/quality.svg: pooled retrieval over memory of the whole cache, one line for each method.

python -m benchmarks.quality.figure
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "vllm-l2kv"  # the same cells make the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.quality.pooled import pooled, retrieval  # noqa: E402
from benchmarks.quality.settings import EQUAL, MAIN_LENGTH, METHODS, PROFILE, PROFILE_HEADS, WHOLE  # noqa: E402
from benchmarks.quality.tables import MODELS, read_cells  # noqa: E402
from vllm_l2kv.tools.evaluation.variants import QUESTIONS  # noqa: E402

PLOT = Path(__file__).parents[2] / "docs" / "img" / "quality.svg"
COLOURS = {"l2": "C0", "keydiff_value": "C2", "learned": "C3", "random": "0.55"}
"""Colours of scorers."""
MARKERS = {"token": "o", "neighbors": "^"}
STYLES = {EQUAL: "--", PROFILE: "-", PROFILE_HEADS: "-."}
Row = Mapping[str, Any]


def main() -> None:
    """Writes the plot: a row of panels for each model that was measured."""
    models = {name: cells for name in MODELS if (cells := at_main_length(read_cells(name)))}
    size = (9, 0.6 + 3 * len(models))
    figure, grid = plt.subplots(len(models), 2, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for (name, cells), line in zip(models.items(), grid, strict=True):
        for question, axes in zip(QUESTIONS, line, strict=True):
            draw(axes, cells, question)
            axes.set(title=f"{MODELS[name]}, question {question}", ylim=(-0.03, 1.03))
        line[0].set(ylabel="pooled retrieval")
    for axes in grid[-1]:
        axes.set(xlabel="memory of the whole cache", xlim=(1.03, 0.12))  # from nothing to much compressed
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(PLOT, metadata={"Date": None})


def at_main_length(cells: Sequence[Row]) -> list[Row]:
    """Returns the cells of the figure's length."""
    return [cell for cell in cells if cell["length"] == MAIN_LENGTH]


def draw(axes: Axes, cells: Sequence[Row], question: str) -> None:
    """Draws one panel; bands are 95 % intervals."""
    whole = retrieval([cell for cell in cells if cell["method"] == WHOLE])
    if whole is None:
        return
    at = pooled(whole)
    axes.axhline(at.value, color="black", linewidth=0.8, linestyle=":", label=WHOLE)
    measured = {cell["method"] for cell in cells}
    for method, (source, scorer, granularity) in METHODS.items():
        # One line for a method: by neighbors, if both were measured.
        if f"{method}-neighbors" in measured:
            continue
        chosen = [cell for cell in cells if (cell["method"], cell["question"]) == (method, question)]
        if not chosen:
            continue
        points = {1.0: at}
        for memory in {cell["memory"] for cell in chosen}:
            if scores := retrieval([cell for cell in chosen if cell["memory"] == memory]):
                points[memory] = pooled(scores)
        memories = sorted(points)
        values, lows, highs = zip(*(points[memory] for memory in memories), strict=True)
        colour, marker = COLOURS[scorer], MARKERS[granularity]
        axes.plot(memories, values, STYLES[source], marker=marker, markersize=3, color=colour, label=method)
        axes.fill_between(memories, lows, highs, color=colour, alpha=0.12, linewidth=0)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
