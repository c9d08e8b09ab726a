"""Plots, one HTML file and what the terminal shows, made of rows."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from vllm_l2kv.cli_types import aligned
from vllm_l2kv.params import CONTROLS, SCORERS
from vllm_l2kv.tools.evaluation.rows import Row
from vllm_l2kv.tools.evaluation.statistics import Estimate, average, share
from vllm_l2kv.tools.html_report import embedded, figure, save, write_html

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
METRIC_NOTES = {
    "excess loss": "loss above that of the whole cache, nats a token; less is better, 0 costs nothing",
    "accuracy": "share of tokens of the continuation that were the likeliest; more is better",
    "score": "from 0 to 1; more is better",
    "exact": "share of answers that have the needle word for word; more is better",
}
CAPTIONS = {
    "curves": "Each point is the mean at one keep ratio with its 95 % interval, {metric}: {note}. The black point at 1 "
    "is the whole cache. A scorer does something for this task where it is better than the dashed controls, random "
    "above all, and the intervals do not overlap.",
    "positions": "How the loss above that of the whole cache goes on while the model reads new tokens. A line that "
    "falls to 0 recovers by what it has read since; one that stays above 0 still misses what was evicted.",
    "depths": "One map for each keep ratio: longer prompts to the right, deeper places of the hidden text further "
    "down. Green is found, red is not, white was not measured. A red row is a place that this ratio loses.",
}
"""Under each kind of figure: how to read it."""


def write_report(rows: Iterable[Row], folder: Path) -> Path:
    """Draws what the rows hold; those that say the same thing again replace the earlier ones.

    Returns:
        Path of the HTML file, which holds the plots too.
    """
    sections = []
    for title, task, group in _sections(rows):
        name = f"{task}-{group[0]['model']}-{'-'.join(map(str, group[0]['full_layers'])) or 'none'}"
        sections.append(
            {
                "title": title,
                "note": f"{conditions(group)} {NOTE}",
                "plots": [embedded(plot, caption) for plot, caption in _plots(group, task, folder, name)],
                "table": table(group, task),
            }
        )
    return write_html("What a keep ratio costs", sections, folder)


def summary(rows: Iterable[Row]) -> str:
    """What the terminal shows of rows: under which conditions they were measured, and a table for each metric."""
    lines = []
    for title, task, group in _sections(rows):
        lines += ["", title, conditions(group)]
        for metric in METRICS[task]:
            lines += ["", f"{metric}: {METRIC_NOTES[metric]}; means with 95 % intervals", *matrix(group, task, metric)]
    return "\n".join(lines) + "\n"


def conditions(rows: Sequence[Row]) -> str:
    """What made the prompts of rows and what was protected, as sentences."""
    compressed = [row for row in rows if row["keep_ratio"] < 1]
    protections = sorted({(row["protect_first"], row["protect_last"]) for row in compressed})
    lengths = sorted({row["length"] for row in rows if "length" in row})
    words = [f"{len({_prompt(row) for row in rows})} prompts of {_joined(lengths)} tokens"]
    for name, unit in (("text", ""), ("seed", ""), ("continued", " tokens")):
        if values := sorted({row[name] for row in rows if name in row}):
            words.append(f"{name} {_joined(values)}{unit}")
    protected = [f"{first} first and {last} last" for first, last in protections] or ["none, nothing was compressed"]
    return f"{', '.join(words)}. Protected tokens: {'; '.join(protected)}."


def matrix(rows: Sequence[Row], task: str, metric: str) -> list[str]:
    """A metric as aligned lines: variants by keep ratio, the whole cache first."""
    entries = estimates(rows, task)
    ratios = sorted({entry["keep_ratio"] for entry in entries if entry["keep_ratio"] < 1}, reverse=True)
    lines = [["", *(f"keep {ratio:g}" for ratio in ratios)]]
    whole = [entry[metric] for entry in entries if entry["keep_ratio"] == 1]
    baseline = [f"{metric} without compression: {_brief(estimate)}" for estimate in whole]
    if metric == "excess loss":
        losses = [row["loss"] for row in rows if row["keep_ratio"] == 1]
        baseline = [f"loss without compression: {_brief(average(losses))}"]
    for name in dict.fromkeys(label(entry) for entry in entries if entry["keep_ratio"] < 1):
        cells = {entry["keep_ratio"]: _brief(entry[metric]) for entry in entries if label(entry) == name}
        lines.append([name, *(cells.get(ratio, "") for ratio in ratios)])
    return [*baseline, *(aligned(lines) if ratios else [])]


def write_diagnosis(
    about: str, config: str, plots: Mapping[Path, str], lines: Sequence[Sequence[str]], folder: Path
) -> Path:
    """The HTML file of a diagnosis.

    Args:
        about: What was measured, as a sentence.
        config: The recommended config file.
        plots: Files, and how to read each of them.
        lines: A table, its first line a heading.
        folder: Where it goes.
    """
    section = {
        "title": "Norms and attention",
        "note": about,
        "plots": [embedded(plot, caption) for plot, caption in plots.items()],
        "text": config,
        "table": lines,
    }
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


def _brief(estimate: Estimate) -> str:
    # 0 is added for its sign: -0.00 looks like a gain.
    mean, low, high = (f"{round(value, 2) + 0.0:.2f}" for value in estimate[:3])
    return f"{mean} (one prompt)" if math.isnan(estimate.low) else f"{mean} ({low} to {high})"


def _joined(values: Iterable[Any]) -> str:
    return " and ".join(map(str, values))


def _sections(rows: Iterable[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """Title, task and rows of what is reported together."""
    for (task, model, layers), group in _grouped(with_excess_loss(rows), "task", "model", "full_layers"):
        yield f"{task}: {model}, full layers {', '.join(map(str, layers)) or 'none'}", task, group


def _plots(rows: Sequence[Row], task: str, folder: Path, name: str) -> Iterator[tuple[Path, str]]:
    """Draws the figures of a section, each with how to read it."""
    for metric in METRICS[task]:
        path = folder / f"{name}-{metric.replace(' ', '-')}.png"
        caption = CAPTIONS["curves"].format(metric=metric, note=METRIC_NOTES[metric])
        yield _curves(rows, task, metric, path), caption
    if task == "perplexity" and any(row["keep_ratio"] < 1 for row in rows):
        yield _positions(rows, folder / f"{name}-positions.png"), CAPTIONS["positions"]
    if "depth" in rows[0]:
        yield _depths(rows, folder / f"{name}-depths.png"), CAPTIONS["depths"]


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
