"""Draws docs/img/memory_and_quality.svg: what a keep ratio gains and costs, from the results folders.

python -m benchmarks.headline_plot
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "vllm-l2kv"  # the same rows make the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.quality.aggregate import AGGREGATES, RESULTS  # noqa: E402
from vllm_l2kv.params import CompressionParams  # noqa: E402
from vllm_l2kv.tools.evaluation.aggregates import estimates  # noqa: E402
from vllm_l2kv.tools.evaluation.rows import read_rows  # noqa: E402
from vllm_l2kv.tools.evaluation.statistics import Estimate  # noqa: E402

ROOT = Path(__file__).parents[1]
MEMORY = ROOT / "benchmarks" / "speed" / "results" / "h100_memory_bound.jsonl"
PLOT = ROOT / "docs" / "img" / "memory_and_quality.svg"
MODELS = {"smollm2": ("SmolLM2-135M", 4096, "-"), "gemma3": ("Gemma-3-270M", 4096, "--")}
"""Of each folder the name, the longest prompts that were measured, and a line style."""
SCORERS = {"l2": "C0", "keydiff": "C2", "random": "0.6"}
Row = dict[str, Any]


def main() -> None:
    """Writes the plot."""
    figure, (memory, passkey, text) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    draw_memory(memory)
    draw_quality(passkey, "passkey", "score")
    draw_quality(text, "perplexity", "excess loss")
    memory.set(ylabel="requests running at once", ylim=(0, None), title="8B shape, 8,000 tokens each, 16 GiB")
    passkey.set(ylabel="pass keys found", ylim=(-0.03, 1.03), title="retrieval")
    text.set(ylabel="excess loss, nats a token", title="continuing a text")
    for axes in (memory, passkey, text):
        axes.set(xlabel="keep ratio", xlim=(1.03, 0.07))  # from nothing to much compressed
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


def draw_quality(axes: Axes, task: str, metric: str) -> None:
    """Scorers as colours, models as line styles; with the default protection."""
    for folder, (model, length, style) in MODELS.items():
        cells = [
            cell
            for cell in read_rows(RESULTS / folder / AGGREGATES)
            if (cell["task"], cell["full_layers"], cell["length"]) == (task, [0, 1], length)
        ]
        entries = estimates(cells, task)
        (whole,) = (entry[metric] for entry in entries if entry["keep_ratio"] == 1)
        for scorer, color in SCORERS.items():
            points = {1.0: whole} | {
                entry["keep_ratio"]: entry[metric]
                for entry in entries
                if entry["keep_ratio"] < 1 and is_of(entry, scorer)
            }
            draw_estimates(axes, points, color=color, linestyle=style, label=f"{scorer}, {model}, {length:,} tokens")


def is_of(entry: Row, scorer: str) -> bool:
    """Whether a variant is the scorer as a server applies it unless told otherwise."""
    protected = all(entry[name] == getattr(CompressionParams, name) for name in ("protect_first", "protect_last"))
    return protected and (entry["scorer"], entry["granularity"]) == (scorer, "token")


def draw_estimates(axes: Axes, points: dict[float, Estimate], **style: Any) -> None:
    """A line with intervals."""
    ratios = sorted(points)
    means = [points[ratio].mean for ratio in ratios]
    below = [points[ratio].mean - points[ratio].low for ratio in ratios]
    above = [points[ratio].high - points[ratio].mean for ratio in ratios]
    axes.errorbar(ratios, means, yerr=(below, above), marker="o", markersize=3, elinewidth=0.6, **style)


if __name__ == "__main__":
    main()
