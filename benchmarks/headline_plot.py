"""Draws docs/img/memory_and_quality.svg, gains and costs of compression, from the folders of results.

python -m benchmarks.headline_plot
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "vllm-l2kv"  # the same rows make the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.quality.pooled import Interval, pooled, retrieval  # noqa: E402
from benchmarks.quality.settings import MAIN_LENGTH, WHOLE  # noqa: E402
from benchmarks.quality.tables import read_cells  # noqa: E402
from vllm_l2kv.tools.evaluation.aggregates import grouped  # noqa: E402
from vllm_l2kv.tools.evaluation.rows import Row, read_rows  # noqa: E402

ROOT = Path(__file__).parents[1]
REQUESTS = ROOT / "benchmarks" / "speed" / "results" / "h100_memory_bound.jsonl"
PLOT = ROOT / "docs" / "img" / "memory_and_quality.svg"
METHODS = {
    "heads-l2-neighbors": "KV heads full that a profile names",
    "profile-l2-neighbors": "layers full that a profile names",
    "equal-l2": "layers 0 and 1 full (no profile)",
}
COLORS = dict(zip(METHODS, ("C2", "C0", "C1"), strict=True))


def main() -> None:
    """Writes the plot."""
    figure, (requests, quality) = plt.subplots(1, 2, figsize=(10, 3.6), sharex=True, layout="constrained")
    draw_requests(requests)
    draw_quality(quality)
    for axes in (requests, quality):
        axes.set(xlabel="memory of the whole KV cache", xlim=(1.03, 0.12))  # from nothing to much compressed
        axes.legend(fontsize="small", loc="lower left")
    requests.legend(fontsize="small", loc="upper left")
    figure.savefig(PLOT, metadata={"Date": None})


def draw_requests(axes: Axes) -> None:
    """Draws the number of requests in one cache, and that of stock vLLM."""
    rows = [row for row in read_rows(REQUESTS) if row["kv_cache_dtype"] == "auto"]
    (stock,) = (row["mean_running"] for row in rows if row["engine"] == "stock")
    points = sorted((memory_of(row), row["mean_running"]) for row in rows if row["engine"] == "l2kv")
    axes.axhline(stock, color="0.4", linestyle=":", label="stock vLLM")
    axes.plot(*zip(*points, strict=True), "o-", label="vllm-l2kv")
    axes.set(ylabel="requests at once", ylim=(0, None), title="8B shape, 8,000 tokens each, 16 GiB of cache, one H100")
    axes.title.set_fontsize("medium")


def memory_of(row: Row) -> float:
    """Returns the share of the whole cache that a prompt keeps; of two groups the first has the full layers."""
    *full, (compressed, _) = row["groups"]
    num_full = sum(num_layers for num_layers, _ in full)
    return (num_full + compressed * row["keep_ratio"]) / (num_full + compressed)


def draw_quality(axes: Axes) -> None:
    """Draws a line for each method, with the question seen; docs/quality.md has the question hidden too."""
    cells = [cell for cell in read_cells("smollm2") if cell["length"] == MAIN_LENGTH]
    whole = pooled(retrieval([cell for cell in cells if cell["method"] == WHOLE]))
    axes.axhline(whole.value, color="0.4", linestyle=":", label="stock vLLM")
    for method, label in METHODS.items():
        chosen = [cell for cell in cells if (cell["method"], cell["question"]) == (method, "seen")]
        points = {memory: pooled(retrieval(group)) for (memory,), group in grouped(chosen, "memory")}
        draw_intervals(axes, {1.0: whole, **points}, COLORS[method], label)
    axes.set(
        ylabel="share of facts found", ylim=(0, 1.03), title="needles, pass keys, RULER; SmolLM2-135M, 2,048 tokens"
    )
    axes.title.set_fontsize("medium")


def draw_intervals(axes: Axes, points: Mapping[float, Interval], color: str, label: str) -> None:
    """Draws a line with its band of 95 %."""
    memories = sorted(points)
    axes.plot(memories, [points[memory].value for memory in memories], "o-", markersize=4, color=color, label=label)
    low, high = ([getattr(points[memory], end) for memory in memories] for end in ("low", "high"))
    axes.fill_between(memories, low, high, color=color, alpha=0.12, linewidth=0)


if __name__ == "__main__":
    main()
