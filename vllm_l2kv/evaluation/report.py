"""Plots and one HTML file, made of rows."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from vllm_l2kv.evaluation.statistics import Estimate, average, share
from vllm_l2kv.page import embedded, figure, save, write_html
from vllm_l2kv.params import CONTROLS, SCORERS

Row = Mapping[str, Any]
NOTE = "Means with 95 % confidence intervals; n is the number of samples."
NUM_POSITIONS = 8
"""Points of a curve over positions."""
VARIANT = ("scorer", "granularity", "protect_first", "protect_last")
PROMPT = ("model", "full_layers", "text", "seed", "continued", "subtask", "length", "depth", "sample")
"""What makes an answer comparable with another one; a task may lack some."""
IDENTITY = ("task", *PROMPT, *VARIANT, "keep_ratio")
METRICS: Mapping[str, Mapping[str, Callable[[Sequence[float]], Estimate]]] = {
    "perplexity": {"excess loss": average, "accuracy": average},
    "passkey": {"score": share},
    "needle": {"score": share, "exact": share},
    "ruler": {"score": share},
}
"""Of each task, what is averaged and how."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_report(rows: Iterable[Row], folder: Path) -> Path:
    """Draws what the rows hold; those that say the same thing again replace the earlier ones.

    Returns:
        Path of the HTML file, which holds the plots too.
    """
    rows = with_excess_loss(rows)
    sections = []
    for (task, model, layers), group in _grouped(rows, "task", "model", "full_layers"):
        name = f"{task}-{model}-{'-'.join(map(str, layers)) or 'none'}"
        plots = [
            _curves(group, task, metric, folder / f"{name}-{metric.replace(' ', '-')}.png") for metric in METRICS[task]
        ]
        is_compressed = any(row["keep_ratio"] < 1 for row in group)
        if task == "perplexity" and is_compressed:
            plots.append(_positions(group, folder / f"{name}-positions.png"))
        if "depth" in group[0]:
            plots.append(_depths(group, folder / f"{name}-depths.png"))
        title = f"{task}: {model}, full layers {', '.join(map(str, layers)) or 'none'}"
        shown = {"plots": [embedded(plot) for plot in plots], "note": NOTE, "table": table(group, task)}
        sections.append({"title": title, **shown})
    return write_html("What a keep ratio costs", sections, folder)


def write_diagnosis(config: str, plots: Sequence[Path], folder: Path) -> Path:
    """The HTML file of a diagnosis."""
    section = {"title": "Norms and attention", "plots": [embedded(plot) for plot in plots], "text": config}
    return write_html("Diagnosis", [section], folder)


def with_excess_loss(rows: Iterable[Row]) -> list[Row]:
    """Rows without those that were said again; losses with their excess over the whole cache, nats a token."""
    rows = {json.dumps([row.get(name) for name in IDENTITY]): row for row in rows}.values()
    full = {_prompt(row): row["loss"] for row in rows if "loss" in row and row["keep_ratio"] == 1}
    return [{**row, "excess loss": row["loss"] - full[_prompt(row)]} if "loss" in row else row for row in rows]


def estimates(rows: Sequence[Row], task: str) -> list[dict[str, Any]]:
    """One entry for each variant and keep ratio, with an `Estimate` under the name of each metric."""
    found = []
    for values, group in _grouped(rows, *VARIANT, "keep_ratio"):
        entry = dict(zip((*VARIANT, "keep_ratio"), values, strict=True))
        entry |= {metric: how([row[metric] for row in group]) for metric, how in METRICS[task].items()}
        found.append(entry)
    return found


def label(entry: Row) -> str:
    """How plots and tables call a variant."""
    if entry["keep_ratio"] == 1:
        return "no compression"
    words = [entry["scorer"]]
    if entry["granularity"] != "token":
        words.append(f"by {entry['granularity']}")
    if entry["protect_first"] or entry["protect_last"]:
        words.append(f"+{entry['protect_first']}/{entry['protect_last']}")
    return " ".join(words)


def table(rows: Sequence[Row], task: str) -> list[list[str]]:
    """Lines of words, the first one a heading: every variant by keep ratio, for each metric."""
    entries = estimates(rows, task)
    ratios = sorted({entry["keep_ratio"] for entry in entries}, reverse=True)
    lines = [["", "metric", *(f"{ratio:g}" for ratio in ratios)]]
    for name in dict.fromkeys(label(entry) for entry in entries):
        for metric in METRICS[task]:
            cells = {entry["keep_ratio"]: _shown(entry[metric]) for entry in entries if label(entry) == name}
            lines.append([name, metric, *(cells.get(ratio, "") for ratio in ratios)])
    return lines


def _shown(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} ({estimate.low:.2f} to {estimate.high:.2f}, n={estimate.num_samples})"


def _prompt(row: Row) -> str:
    return json.dumps([row.get(name) for name in PROMPT])


def _grouped(rows: Iterable[Row], *names: str) -> list[tuple[list[Any], list[Row]]]:
    def key(row: Row) -> list[Any]:
        return [row[name] for name in names]

    return [(values, list(group)) for values, group in groupby(sorted(rows, key=key), key)]


def _curves(rows: Sequence[Row], task: str, metric: str, path: Path) -> Path:
    """A metric over the keep ratio: a line for each variant, dashed for controls."""
    entries = estimates(rows, task)
    numbers = sorted({entry[metric].num_samples for entry in entries})
    title = f"{task}, {metric}; samples of each point: {' or '.join(map(str, numbers))}"
    drawn, axes = figure(title, "keep ratio", metric)
    for name in dict.fromkeys(label(entry) for entry in entries):
        line = sorted((entry for entry in entries if label(entry) == name), key=lambda entry: entry["keep_ratio"])
        means = [entry[metric].mean for entry in line]
        errors = [
            [entry[metric].mean - entry[metric].low for entry in line],
            [entry[metric].high - entry[metric].mean for entry in line],
        ]
        ratios = [entry["keep_ratio"] for entry in line]
        axes.errorbar(ratios, means, errors, label=name, capsize=2, **_style(line[0]))
    return save(drawn, axes, path)


def _positions(rows: Sequence[Row], path: Path) -> Path:
    """Excess loss over the position in the continuation, at the middle of the keep ratios."""
    ratios = sorted({row["keep_ratio"] for row in rows if row["keep_ratio"] < 1})
    ratio = ratios[len(ratios) // 2]
    full = {_prompt(row): row["losses"] for row in rows if row["keep_ratio"] == 1}
    drawn, axes = figure(f"excess loss at keep ratio {ratio:g}", "tokens after the compressed context", "nats")
    for _, group in _grouped((row for row in rows if row["keep_ratio"] == ratio), *VARIANT):
        excess = [
            [loss - other for loss, other in zip(row["losses"], full[_prompt(row)], strict=True)] for row in group
        ]
        means = [mean(column) for column in zip(*excess, strict=False)]  # continuations may differ in length
        size = max(len(means) // NUM_POSITIONS, 1)
        points = [sum(means[start : start + size]) / size for start in range(0, len(means) - size + 1, size)]
        axes.plot(
            [1.5 + size * (i + 0.5) for i in range(len(points))], points, label=label(group[0]), **_style(group[0])
        )
    return save(drawn, axes, path)


def _depths(rows: Sequence[Row], path: Path) -> Path:
    """Heat maps of the score, lengths by depths: one for each keep ratio, of the first variant that is no control."""
    from matplotlib.figure import Figure

    tested = [row for row in rows if row["keep_ratio"] == 1 or row["scorer"] not in CONTROLS]
    ratios = sorted({row["keep_ratio"] for row in tested}, reverse=True)
    first = min((label(row) for row in tested if row["keep_ratio"] < 1), default="no compression")
    lengths, depths = (sorted({row[name] for row in tested}) for name in ("length", "depth"))
    figure = Figure(figsize=(2.6 * len(ratios), 3), layout="constrained")
    figure.suptitle(f"score of {first}")
    for axes, ratio in zip(figure.subplots(1, len(ratios), squeeze=False)[0], ratios, strict=True):
        cells: dict[Any, list[float]] = {}
        for row in tested:
            if row["keep_ratio"] == ratio and label(row) in (first, "no compression"):
                cells.setdefault((row["depth"], row["length"]), []).append(row["score"])
        # Runs may differ in what they measured.
        values = [[mean(cells.get((depth, length), [math.nan])) for length in lengths] for depth in depths]
        image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set(title=f"keep {ratio:g}", xlabel="tokens", xticks=range(len(lengths)), xticklabels=lengths)
        axes.set(yticks=range(len(depths)), yticklabels=depths)
    figure.colorbar(image)
    figure.savefig(path)
    return path


def _style(entry: Row) -> dict[str, Any]:
    """A colour for each scorer, squares for what protects, dashes for controls."""
    protects = entry["protect_first"] or entry["protect_last"]
    return {
        "color": f"C{SCORERS.index(entry['scorer'])}" if entry["keep_ratio"] < 1 else "black",
        "linestyle": "--" if entry["scorer"] in CONTROLS else "-",
        "marker": "s" if protects else "o",
        "fillstyle": "full" if entry["granularity"] == "token" else "none",
        "markersize": 4,
        "linewidth": 0.8,
    }
