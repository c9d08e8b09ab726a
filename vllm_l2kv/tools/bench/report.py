"""Tables, plots and an HTML page made from rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_l2kv.tools.bench.servers import OURS, STOCK
from vllm_l2kv.tools.bench.summary import asked, label
from vllm_l2kv.tools.html_report import embedded, figure, save, write_html

Row = Mapping[str, Any]
MILLION, GIB = 1e6, 2**30
PERCENTILES = ("p50", "p95", "p99")
ENGINES = (OURS, STOCK)


def metrics(rows: Iterable[Row]) -> dict[str, Callable[[Row], float | None]]:
    """The metrics of the tables, by the name in their first column."""
    found: dict[str, Callable[[Row], float | None]] = {
        "requests/s": _of("requests_per_s"),
        "output tok/s": _of("output_tokens_per_s"),
    }
    times = {
        "first token": "first_token_s",
        "inter-token": "inter_token_s",
        "per output token": "per_output_token_s",
        "end to end": "end_to_end_s",
    }
    for name, key in times.items():
        found |= {f"{name}, {p} (ms)": _of(key, p, scale=1000) for p in PERCENTILES}
    found |= {
        "requests running, mean": _of("running", "mean"),
        "requests running, most": _of("running", "max"),
        "requests waiting, mean": _of("waiting", "mean"),
        "KV cache in use, mean (%)": _of("kv_cache_usage", "mean", scale=100),
        "KV cache in use, most (%)": _of("kv_cache_usage", "max", scale=100),
        "preemptions": _of("preemptions"),
        "prompt tokens from the prefix cache (%)": _of("prefix_hits", scale=100),
        "memory of the server's process, peak (GiB)": _of("memory", "process", scale=1 / GIB),
        "memory of all its processes, peak (GiB)": _of("memory", "tree", scale=1 / GIB),
        "memory in use on GPUs, peak (GiB)": _of("memory", "gpus", scale=1 / GIB),
        "rows kept": _of("kept_tokens"),
        "rows evicted": _of("evicted_tokens"),
        "compactions": _of("compactions"),
        "memory of the whole KV cache (%)": _of("memory_ratio", scale=100),
        "requests answered": lambda row: row["num_requests"] - row["num_failed"],
        "requests failed": _of("num_failed"),
        "tokens per event": _of("tokens_per_event"),
        "delay of sending, most (ms)": _of("max_late_s", scale=1000),
    }
    own = sorted({name for row in rows for name in row["own_metrics"]})
    return found | {name: _of("own_metrics", name) for name in own}


def _of(*path: str, scale: float = 1.0) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        found: Any = row
        for name in path:
            found = (found or {}).get(name)
        return None if found is None else scale * found

    return value


def table(rows: Sequence[Row], engine: str) -> list[list[str]]:
    """A table as lines of cells, the first one a heading: metrics by round, without metrics that were not measured."""
    of_engine = [row for row in rows if row["engine"] == engine]
    beside = "" if engine == OURS else "beside "
    lines = [["", *(f"{beside}{asked(row)}" for row in of_engine)]]
    for name, value in metrics(rows).items():
        values = [value(row) for row in of_engine]
        if any(number is not None for number in values):
            lines.append([name, *map(shown, values)])
    return lines


def comparison(rows: Sequence[Row]) -> list[list[str]]:
    """The values of vllm-l2kv divided by those of stock vLLM in the same round; empty without stock vLLM."""
    by_round = {engine: {row["round"]: row for row in rows if row["engine"] == engine} for engine in ENGINES}
    both = sorted(by_round[OURS].keys() & by_round[STOCK].keys())
    if not both:
        return []
    lines = [["", *(asked(by_round[OURS][i]) for i in both)]]
    for name, value in metrics(rows).items():
        quotients = [_quotient(value(by_round[OURS][i]), value(by_round[STOCK][i])) for i in both]
        if any(number is not None for number in quotients):
            lines.append([name, *("-" if number is None else f"{number:.3f}" for number in quotients)])
    return lines


def shown(number: float | None) -> str:
    """A number with at least three significant digits, or an integer, for tables of small and large numbers."""
    if number is None:
        return "-"
    if abs(number) >= 100 or number == int(number):
        return f"{number:,.0f}"
    return f"{number:#.3g}"


def errors(rows: Sequence[Row]) -> str:
    """One line for each kind of error of each round."""
    return "\n".join(f"{label(row)}: {number} x {error}" for row in rows for error, number in row["errors"].items())


def write_report(rows: Sequence[Row], samples: Sequence[Row], folder: Path) -> Path:
    """Draws the plots and writes the page.

    Args:
        rows: One row for each round and server.
        samples: Samples of all rounds, from `Watch.rows`.
        folder: Folder of plots and page.

    Returns:
        Path of the HTML file, which also embeds the plots.
    """
    plots = [
        _bars(rows, {"": _of("output_tokens_per_s")}, "throughput", "output tok/s", folder),
        *(
            _bars(rows, {f" {p}": _of(key, p) for p in PERCENTILES}, name, "seconds", folder)
            for name, key in (
                ("time to first token", "first_token_s"),
                ("inter-token time", "inter_token_s"),
                ("end-to-end time", "end_to_end_s"),
            )
        ),
        _bars(rows, {" mean": _of("running", "mean"), " most": _of("running", "max")}, "requests running", "", folder),
        _timeline(samples, folder),
    ]
    load = rows[0]["load"]
    words = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in load.items())
    note = f"{rows[0]['model']}, vLLM {rows[0]['vllm']}. {words}."
    sections: list[dict[str, Any]] = [{"title": OURS, "note": note, "table": table(rows, OURS)}]
    if compared := comparison(rows):
        beside = "The same prompts at the same times without compression, right before or after each round."
        sections.insert(0, {"title": f"{OURS} / {STOCK}", "note": note, "table": compared})
        sections.append({"title": STOCK, "note": beside, "table": table(rows, STOCK)})
    sections.append({"title": "Plots", "plots": [embedded(plot) for plot in plots]})
    if failed := errors(rows):
        sections.insert(0, {"title": "Errors", "text": failed})
    return write_html("Load test", sections, folder)


def _bars(
    rows: Sequence[Row], values: Mapping[str, Callable[[Row], float | None]], title: str, unit: str, folder: Path
) -> Path:
    """A bar chart with one group for each round; bars of stock vLLM are hatched."""
    series = [(engine, *entry) for engine in ENGINES for entry in values.items() if _has(rows, engine)]
    drawn, axes = figure(title, "", unit)
    width = 0.8 / len(series)
    for i, (engine, name, value) in enumerate(series):
        of_engine = [row for row in rows if row["engine"] == engine]
        heights = [value(row) or 0 for row in of_engine]
        places = [row["round"] + width * (i - (len(series) - 1) / 2) for row in of_engine]
        hatch = "//" if engine == STOCK else None
        color = f"C{list(values).index(name)}"
        axes.bar(places, heights, width, label=engine + name, color=color, alpha=0.5 if hatch else 1, hatch=hatch)
    names = {row["round"]: asked(row) for row in rows}
    axes.set(xticks=list(names), xticklabels=list(names.values()))
    return save(drawn, axes, folder / f"{title.replace(' ', '-')}.png")


def _timeline(samples: Sequence[Row], folder: Path) -> Path:
    """KV cache in use over time, with one line per round: a color for each ratio or budget, gray for stock vLLM."""
    drawn, axes = figure("KV cache in use", "seconds", "%")
    kinds = list(dict.fromkeys(map(asked, samples)))
    named = set()
    for i, engine in sorted({(row["round"], row["engine"]) for row in samples}):
        line = [row for row in samples if (row["round"], row["engine"]) == (i, engine)]
        seen = [row for row in line if row["kv_cache_usage"] is not None]
        name = label(line[0]) if engine == OURS else engine
        axes.plot(
            [row["at_s"] for row in seen],
            [100 * row["kv_cache_usage"] for row in seen],
            label=None if name in named else name,
            color=f"C{kinds.index(asked(line[0]))}" if engine == OURS else "grey",
            linewidth=1.2 if engine == OURS else 0.6,
        )
        named.add(name)
    return save(drawn, axes, folder / "kv-cache-in-use.png")


def _has(rows: Sequence[Row], engine: str) -> bool:
    return any(row["engine"] == engine for row in rows)


def _quotient(value: float | None, stock: float | None) -> float | None:
    return None if value is None or not stock else value / stock
