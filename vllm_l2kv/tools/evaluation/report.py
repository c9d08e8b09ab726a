"""Plots, an HTML report and terminal tables, made from rows.

Tables and curves need only aggregates, which may be all that is left of a run. Plots by position and by depth need the
rows of answers.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from zlib import crc32

from vllm_l2kv.cli_types import aligned, full_in_words, heads
from vllm_l2kv.params import CONTROLS, SCORERS
from vllm_l2kv.tools.evaluation.aggregates import (
    METRICS,
    VARIANT,
    aggregates,
    estimates,
    grouped,
    is_whole,
    memory_of,
    moments_of,
    num_prompts,
    prompt_of,
    with_excess_loss,
)
from vllm_l2kv.tools.evaluation.rows import Row
from vllm_l2kv.tools.evaluation.statistics import Estimate, average
from vllm_l2kv.tools.evaluation.variants import HIDDEN
from vllm_l2kv.tools.html_report import embedded, figure, save, write_html

NOTE = "Means with 95 % confidence intervals; n is the number of samples."
AXES = {"keep_ratio": "keep ratio", "max_tokens": "budget, rows per head"}
NUM_POSITIONS = 8
"""Points of a curve over positions."""
METRIC_NOTES = {
    "excess loss": "loss above that of the whole cache, in nats per token; lower is better, 0 is no loss",
    "accuracy": "share of tokens of the continuation that the model finds most likely; higher is better",
    "score": "from 0 to 1; higher is better",
    "exact": "share of answers with the needle word for word; higher is better",
}
CAPTIONS = {
    "budgets": "Each point is the mean at one budget with its 95 % interval, {metric}: {note}. The black line is the "
    "whole cache.",
    "curves": "Each point is the mean at one keep ratio with its 95 % interval, {metric}: {note}. The black point at 1 "
    "is the whole cache. A scorer helps in this task if it is better than the dashed controls, above all than random, "
    "and the intervals do not overlap.",
    "positions": "Excess loss over the tokens that the model reads after the compressed context. A line that falls to "
    "0 recovers with the new tokens; one that stays above 0 still needs what was evicted.",
    "depths": "One map for each ratio and budget: prompt length to the right, depth of the hidden text downward. Green "
    "is found, red is not found, white was not measured. A red row is a depth at which the text is lost.",
}
"""Captions of the figures, which say how to read them."""
CONDITIONS = {
    "text": "text {}",
    "seed": "seed {}",
    "continued": "continued {} tokens",
    "device": "on {}",
    "dtype": "{}",
    "vllm": "vLLM {}",
    "commit": "commit {}",
}
"""Phrases for the fields of rows."""


class Section(NamedTuple):
    """A section of the report: one task and model with the same full layers and heads.

    Attributes:
        task: Name of the task.
        model: Name of the model.
        full_layers: Layers that never compact.
        full_heads: KV heads of other layers that never compact, in the form of the option; `None` if there are none.
        cells: Aggregates.
        answers: Rows of single answers, if given.
    """

    task: str
    model: str
    full_layers: Sequence[int]
    full_heads: str | None
    cells: Sequence[Row]
    answers: Sequence[Row]

    @property
    def title(self) -> str:
        """Its heading."""
        return f"{self.task}: {self.model}, {full_in_words(self.full_layers, heads(self.full_heads or ''))}"

    @property
    def file_name(self) -> str:
        """Prefix of the names of its files, with the number of full heads and a digest of them."""
        name = f"{self.task}-{self.model}-{'-'.join(map(str, self.full_layers)) or 'none'}"
        if self.full_heads is None:
            return name
        num_heads = sum(map(len, heads(self.full_heads).values()))
        return f"{name}-{num_heads}-heads-{sha256(self.full_heads.encode()).hexdigest()[:8]}"


def write_report(rows: Iterable[Row], folder: Path) -> Path:
    """Draws plots of the rows and writes the report. Of duplicate rows, the last one counts.

    Args:
        rows: Rows of answers, or aggregates.
        folder: Folder of plots and page.

    Returns:
        Path of the HTML file, which also embeds the plots.

    Raises:
        ValueError: See `with_excess_loss`.
    """
    sections = [
        {
            "title": section.title,
            "note": f"{conditions(section.cells)} {NOTE}",
            "plots": [embedded(plot, caption) for plot, caption in _plots(section, folder)],
            "table": table(section.cells, section.task),
        }
        for section in _sections(rows)
    ]
    return write_html("What compression costs", sections, folder)


def summary(rows: Iterable[Row]) -> str:
    """Text for the terminal: the conditions of the measurement, and a table for each metric."""
    lines = []
    for section in _sections(rows):
        lines += ["", section.title, conditions(section.cells)]
        for metric in METRICS[section.task]:
            lines += ["", f"{metric}: {METRIC_NOTES[metric]}; means with 95 % intervals"]
            lines += matrix(section.cells, section.task, metric)
    return "\n".join(lines) + "\n"


def conditions(cells: Sequence[Row]) -> str:
    """Sentences on the prompts of aggregates, the machine, and the protected tokens."""
    compressed = [cell for cell in cells if not is_whole(cell)]
    protections = sorted({(cell["protect_first"], cell["protect_last"]) for cell in compressed})
    words = [f"{num_prompts(cells)} prompts of {_joined(_values(cells, 'length'))} tokens"]
    words += [said.format(_joined(values)) for name, said in CONDITIONS.items() if (values := _values(cells, name))]
    protected = [f"{first} first and {last} last" for first, last in protections] or ["none, nothing was compressed"]
    text = f"{', '.join(words)}. Protected tokens: {'; '.join(protected)}."
    if intervals := _values((cell for cell in cells if budget_of(cell)), "prompt_interval"):
        text += " Budget B+I: compacted to B rows when a head holds B+I; before the end of the prompt when it holds "
        text += f"B+{_joined(intervals)}."
    return text


def matrix(cells: Sequence[Row], task: str, metric: str) -> list[str]:
    """A metric of aggregates as aligned lines: variants by amount, the whole cache first."""
    compressed = [entry for entry in estimates(cells, task) if not is_whole(entry)]
    whole = [cell for cell in cells if is_whole(cell)]
    name, how = ("loss", average) if metric == "excess loss" else (metric, METRICS[task][metric])
    baseline = [f"{name} without compression: {_brief(how(moments_of(whole, name)))}"] if whole else []
    columns, lines = by_amount(compressed, metric, _brief)
    if not lines:
        return baseline
    heads = [["", *columns], *_memories(cells, columns)]
    return [*baseline, *aligned([*heads, *([name, *words] for name, words in lines.items())])]


def by_amount(
    entries: Sequence[Row], metric: str, shown: Callable[[Estimate], str]
) -> tuple[list[str], dict[str, list[str]]]:
    """The amounts in order, and for each variant the metric at each amount, empty if it was not measured."""
    names = amounts(entries)
    lines = {label(entry): [""] * len(names) for entry in entries}
    for entry in entries:
        lines[label(entry)][names.index(amount(entry))] = shown(entry[metric])
    return names, lines


def amounts(rows: Iterable[Row]) -> list[str]:
    """Labels of how much was kept: ratios in descending order, then budgets in descending order."""

    def order(row: Row) -> tuple[Any, ...]:
        budget = budget_of(row)
        return budget is not None, -row["keep_ratio"], -(budget or 0), row.get("answer_interval") or 0

    return list(dict.fromkeys(map(amount, sorted(rows, key=order))))


def amount(row: Row) -> str:
    """Label of how much was kept: the ratio, or the budget with its interval in the answer."""
    budget = budget_of(row)
    return f"keep {row['keep_ratio']:g}" if budget is None else f"budget {budget:,}+{row['answer_interval']:,}"


def budget_of(row: Row) -> int | None:
    """The budget of a row; `None` for a ratio or the whole cache."""
    budget: int | None = row.get("max_tokens")
    return budget


def label(entry: Row) -> str:
    """Label of a variant."""
    if is_whole(entry):
        return "no compression"
    words = [entry["scorer"]]
    if entry["granularity"] != "token":
        words.append(f"by {entry['granularity']}")
    if entry["protect_first"] or entry["protect_last"]:
        words.append(f"+{entry['protect_first']}/{entry['protect_last']}")
    if entry.get("question") == HIDDEN:
        words.append(HIDDEN)
    return " ".join(words)


def table(cells: Sequence[Row], task: str) -> list[list[str]]:
    """A table as lines of cells, the first one a heading: every variant by amount, for each metric."""
    entries = estimates(cells, task)
    lines = {metric: by_amount(entries, metric, _shown)[1] for metric in METRICS[task]}
    names = dict.fromkeys(label(entry) for entry in entries)
    columns = amounts(entries)
    return [
        ["", "metric", *columns],
        *([name, "", *shares] for name, *shares in _memories(cells, columns)),
        *([name, metric, *lines[metric][name]] for name in names for metric in METRICS[task]),
    ]


def _memories(cells: Sequence[Row], columns: Sequence[str]) -> Iterator[list[str]]:
    """A line of a table with the share of the whole cache that each amount costs, if the aggregates have it."""
    shares = [memory_of(cell for cell in cells if amount(cell) == column) for column in columns]
    if None not in shares:
        yield ["memory of the whole cache", *(f"{share:.2f}" for share in shares)]


def _shown(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} ({estimate.low:.2f} to {estimate.high:.2f}, n={estimate.num_samples})"


def _brief(estimate: Estimate) -> str:
    # Adding 0 turns -0.0 into 0.0, since -0.00 would look like a gain.
    mean, low, high = (f"{round(value, 2) + 0.0:.2f}" for value in estimate[:3])
    return f"{mean} (one prompt)" if math.isnan(estimate.low) else f"{mean} ({low} to {high})"


def _joined(values: Iterable[Any]) -> str:
    return " and ".join(map(str, values))


def _values(cells: Iterable[Row], name: str) -> list[Any]:
    return sorted({cell[name] for cell in cells if name in cell})


def _sections(rows: Iterable[Row]) -> Iterator[Section]:
    rows = list(rows)
    kind = ("task", "model", "full_layers", "full_heads")
    answers = {str(values): group for values, group in grouped(with_excess_loss(rows), *kind)}
    for values, cells in grouped(aggregates(rows), *kind):
        task, model, full_layers, full_heads = values
        yield Section(task, model, full_layers, full_heads, cells, answers.get(str(values), []))


def _plots(section: Section, folder: Path) -> Iterator[tuple[Path, str]]:
    """Draws the figures of a section, each with its caption."""
    task, answers = section.task, section.answers
    name = section.file_name
    entries = estimates(section.cells, task)
    by_ratio, by_budget = ([entry for entry in entries if has == bool(budget_of(entry))] for has in (False, True))
    for metric in METRICS[task]:
        path = folder / f"{name}-{metric.replace(' ', '-')}"
        caption = {"metric": metric, "note": METRIC_NOTES[metric]}
        yield _curves(by_ratio, task, metric, path.with_suffix(".png")), CAPTIONS["curves"].format(**caption)
        if by_budget:
            beside = [*filter(is_whole, entries), *by_budget]
            path = path.with_name(f"{path.name}-budgets.png")
            yield _curves(beside, task, metric, path, "max_tokens"), CAPTIONS["budgets"].format(**caption)
    if task == "perplexity" and any(row["keep_ratio"] < 1 for row in answers):
        yield _positions(answers, folder / f"{name}-positions.png"), CAPTIONS["positions"]
    if answers and "depth" in answers[0]:
        yield _depths(answers, folder / f"{name}-depths.png"), CAPTIONS["depths"]


def _curves(entries: Sequence[Row], task: str, metric: str, path: Path, over: str = "keep_ratio") -> Path:
    """A metric over the keep ratio or the budget: a line for each variant, dashed for controls."""
    numbers = sorted({entry[metric].num_samples for entry in entries})
    title = f"{task}, {metric}; samples of each point: {' or '.join(map(str, numbers))}"
    drawn, axes = figure(title, AXES[over], metric)
    for name in dict.fromkeys(label(entry) for entry in entries):
        line = [entry for entry in entries if label(entry) == name]
        if line[0][over] is None:  # the whole cache, in plots over budgets
            axes.axhline(line[0][metric].mean, label=name, color="black", linewidth=0.8)
            continue
        line.sort(key=lambda entry: entry[over])
        means = [entry[metric].mean for entry in line]
        errors = [
            [entry[metric].mean - entry[metric].low for entry in line],
            [entry[metric].high - entry[metric].mean for entry in line],
        ]
        axes.errorbar([entry[over] for entry in line], means, errors, label=name, capsize=2, **_style(line[0]))
    return save(drawn, axes, path)


def _positions(rows: Sequence[Row], path: Path) -> Path:
    """Excess loss over the position in the continuation, at the middle of the keep ratios."""
    ratios = sorted({row["keep_ratio"] for row in rows if row["keep_ratio"] < 1})
    ratio = ratios[len(ratios) // 2]
    full = {prompt_of(row): row["losses"] for row in rows if is_whole(row)}
    drawn, axes = figure(f"excess loss at keep ratio {ratio:g}", "tokens after the compressed context", "nats")
    for _, group in grouped((row for row in rows if row["keep_ratio"] == ratio), *VARIANT):
        excess = [
            [loss - other for loss, other in zip(row["losses"], full[prompt_of(row)], strict=True)] for row in group
        ]
        means = [mean(column) for column in zip(*excess, strict=False)]  # continuations may differ in length
        size = max(len(means) // NUM_POSITIONS, 1)
        points = [sum(means[start : start + size]) / size for start in range(0, len(means) - size + 1, size)]
        axes.plot(
            [1.5 + size * (i + 0.5) for i in range(len(points))], points, label=label(group[0]), **_style(group[0])
        )
    return save(drawn, axes, path)


def _depths(rows: Sequence[Row], path: Path) -> Path:
    """Heat maps of the score by length and depth, one for each amount, for the first variant that is not a control."""
    from matplotlib.figure import Figure

    tested = [row for row in rows if is_whole(row) or row["scorer"] not in CONTROLS]
    columns = amounts(tested)
    first = min((label(row) for row in tested if not is_whole(row)), default="no compression")
    lengths, depths = (sorted({row[name] for row in tested}) for name in ("length", "depth"))
    figure = Figure(figsize=(2.6 * len(columns), 3), layout="constrained")
    figure.suptitle(f"score of {first}")
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        cells: dict[Any, list[float]] = {}
        for row in tested:
            if amount(row) == column and label(row) in (first, "no compression"):
                cells.setdefault((row["depth"], row["length"]), []).append(row["score"])
        # Runs may have measured different lengths and depths.
        values = [[mean(cells.get((depth, length), [math.nan])) for length in lengths] for depth in depths]
        image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set(title=column, xlabel="tokens", xticks=range(len(lengths)), xticklabels=lengths)
        axes.set(yticks=range(len(depths)), yticklabels=depths)
    figure.colorbar(image)
    figure.savefig(path)
    return path


def _style(entry: Row) -> dict[str, Any]:
    """A color for each scorer, squares for variants that protect tokens, dashes for controls."""
    protects = entry["protect_first"] or entry["protect_last"]
    scorer = entry["scorer"]
    # A user's scorer is not in the list; a checksum of its name gives it the same color in every plot.
    place = SCORERS.index(scorer) if scorer in SCORERS else crc32(scorer.encode())
    return {
        "color": "black" if is_whole(entry) else f"C{place}",
        "linestyle": "--" if scorer in CONTROLS else "-",
        "marker": "s" if protects else "o",
        "fillstyle": "full" if entry["granularity"] == "token" else "none",
        "markersize": 4,
        "linewidth": 0.8,
    }
