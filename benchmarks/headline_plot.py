"""Draws docs/img/memory_and_quality.svg: what compression gains and costs, from the results folders.

python -m benchmarks.headline_plot
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "vllm-l2kv"  # the same rows make the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.quality.pooled import Interval, Scores, pooled, retrieval  # noqa: E402
from benchmarks.quality.settings import MAIN_LENGTH, WHOLE  # noqa: E402
from benchmarks.quality.tables import MODELS, read_cells  # noqa: E402
from vllm_l2kv.tools.evaluation.aggregates import grouped  # noqa: E402
from vllm_l2kv.tools.evaluation.rows import Row, read_rows  # noqa: E402

ROOT = Path(__file__).parents[1]
MEMORY = ROOT / "benchmarks" / "speed" / "results" / "h100_memory_bound.jsonl"
PLOT = ROOT / "docs" / "img" / "memory_and_quality.svg"
METHODS = {"equal-l2": "C0", "profile-l2": "C1", "profile-learned": "C3", "profile-random": "0.6"}
STYLES = {"smollm2": "-", "gemma3": "--"}
"""Of methods the colours, of models the line styles."""
QUESTION = "seen"


def main() -> None:
    """Writes the plot."""
    figure, (memory, found, text) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    draw_memory(memory)
    draw_quality(found, retrieval)
    draw_quality(text, excess_loss)
    memory.set(ylabel="requests running at once", ylim=(0, None), title="8B shape, 8,000 tokens each, 16 GiB")
    found.set(ylabel="pooled retrieval", ylim=(-0.03, 1.03), title="needles, pass keys, RULER")
    text.set(ylabel="excess loss, nats a token", title="continuing a text")
    memory.set(xlabel="keep ratio")
    for axes in (found, text):
        axes.set(xlabel="memory of the whole cache")
    for axes in (memory, found, text):
        axes.set(xlim=(1.03, 0.07))  # from nothing to much compressed
    memory.legend(fontsize="small")
    text.legend(fontsize="x-small", loc="upper left")
    figure.savefig(PLOT, metadata={"Date": None})


def draw_memory(axes: Axes) -> None:
    """Requests in one cache, beside stock vLLM."""
    rows = [row for row in read_rows(MEMORY) if row["kv_cache_dtype"] == "auto"]
    (stock,) = (row["mean_running"] for row in rows if row["engine"] == "stock")
    ours = sorted((row["keep_ratio"], row["mean_running"]) for row in rows if row["engine"] == "l2kv")
    axes.axhline(stock, color="0.5", linestyle=":", label="stock vLLM")
    axes.plot(*zip(*ours, strict=True), "o-", label="vllm-l2kv")


def draw_quality(axes: Axes, scores_of: Callable[[Sequence[Row]], Scores | None]) -> None:
    """Methods as colours, models as line styles; with the question seen, at the main length."""
    for name, style in STYLES.items():
        cells = [
            cell
            for cell in read_cells(name)
            if (cell["length"], cell["question"]) == (MAIN_LENGTH, QUESTION) and cell["method"] in (WHOLE, *METHODS)
        ]
        points: dict[str, dict[float, Interval]] = {method: {} for method in METHODS}
        for (method, memory), group in grouped(cells, "method", "memory"):
            if scores := scores_of(group):
                for line in METHODS if method == WHOLE else [method]:
                    points[line][memory] = pooled(scores)
        for method, color in METHODS.items():
            if points[method]:
                draw_intervals(axes, points[method], color=color, linestyle=style, label=f"{method}, {MODELS[name]}")


def excess_loss(cells: Sequence[Row]) -> Scores | None:
    """Of texts; that of the whole cache is 0."""
    for cell in cells:
        if cell["task"] == "perplexity":
            return {"perplexity": [0.0] if cell["method"] == WHOLE else cell["scores"]}
    return None


def draw_intervals(axes: Axes, points: Mapping[float, Interval], **style: Any) -> None:
    """A line with intervals."""
    memories = sorted(points)
    values = [points[memory].value for memory in memories]
    below = [points[memory].value - points[memory].low for memory in memories]
    above = [points[memory].high - points[memory].value for memory in memories]
    axes.errorbar(memories, values, yerr=(below, above), marker="o", markersize=3, elinewidth=0.6, **style)


if __name__ == "__main__":
    main()
