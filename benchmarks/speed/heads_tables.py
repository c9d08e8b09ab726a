"""The section of docs/benchmarks.md about engines with full KV heads."""

from collections.abc import Iterable

from benchmarks.speed.page_parts import Row, provenance, table

SECTION = """
## Full heads in an engine

`full heads`: every second layer has two full heads of eight, {full_heads:g} of all heads; no layer is full. `equal
counts`: vllm-l2kv without full layers and heads. Both keep the same share of a prompt's rows, which is `memory`. `of
stock` and `of equal` are the ratios of full heads to the others. One engine of each, {about}

Median decode step, milliseconds, by requests x prompt tokens. Targets: {idle_target:g} x stock with nothing compressed,
{short_target:g} at {short}; {target:g} x equal counts. {found}

{steps}

A cache of {cache}, always eight requests in the queue as [above](#a-cache-too-small-for-its-requests), {seconds:.0f}
seconds of steady state:

{load}

Time to first token of one request on an idle engine, milliseconds. Target: {first_token_target:g} x stock.
{first_finding}

{first_tokens}

    python -m benchmarks.speed.heads --model FOLDER --out h100_heads.jsonl
"""
ENGINES = {"stock": "stock", "equal": "equal counts", "one_call": "full heads"}
"""Variants, and their names in the tables."""
SHORT = "64x256"
IDLE_TARGET, SHORT_TARGET, TARGET, FIRST_TOKEN_TARGET = 1.02, 1.04, 1.08, 1.02
Case = tuple[str, float]
"""A load, and the share of rows that are kept."""


def heads_section(rows: list[Row]) -> str:
    """Returns the section.

    Args:
        rows: Rows of `heads.py`.
    """
    loads = [row for row in rows if row["case"] == "load"]
    return SECTION.format(
        full_heads=rows[0]["full_heads"],
        about=provenance(rows),
        idle_target=IDLE_TARGET,
        short_target=SHORT_TARGET,
        target=TARGET,
        short=SHORT,
        found=finding(step_ratios(rows)),
        steps=compared(times_of(rows, "decode", "median_step_ms")),
        cache=loads[0]["load"],
        seconds=max(row["seconds"] for row in loads),
        load=load_table(loads),
        first_token_target=FIRST_TOKEN_TARGET,
        first_finding=finding(first_token_ratios(rows)),
        first_tokens=compared(times_of(rows, "first_token", "median_first_token_ms"), counts_of(rows)),
    )


def heads_verdict(rows: list[Row]) -> str:
    """Returns the smallest and largest ratios of a decode step, in words."""
    times = times_of(rows, "decode", "median_step_ms")
    idle = [of["one_call"] / of["stock"] for (_, memory), of in times.items() if memory == 1]
    compressed = [of["one_call"] / of["equal"] for (_, memory), of in times.items() if memory < 1]
    return (
        f"{min(idle):.3f} to {max(idle):.3f} x stock's decode step with nothing compressed; "
        f"{min(compressed):.3f} to {max(compressed):.3f} x that of equal counts in the same memory"
    )


def memory_of(row: Row) -> float:
    """Returns the share of a prompt's rows that a request keeps."""
    return row["full_heads"] + (1 - row["full_heads"]) * row["rate"] if row["compacted"] else 1


def times_of(rows: list[Row], case: str, field: str) -> dict[Case, dict[str, float]]:
    """Returns the time of each variant in each case, whole prompts first; stock vLLM's are whole in every case."""
    times: dict[Case, dict[str, float]] = {}
    for row in rows:
        if row["case"] == case:
            times.setdefault((row["load"], memory_of(row)), {})[row["variant"]] = row[field]
    whole = {load: of["stock"] for (load, _), of in times.items() if "stock" in of}
    of_heads = {case: {"stock": whole[case[0]], **of} for case, of in times.items() if "one_call" in of}
    return dict(sorted(of_heads.items(), key=lambda item: -item[0][1]))


def counts_of(rows: list[Row]) -> dict[str, int]:
    """Returns the number of first tokens measured for each load, the fewest of all variants."""
    counts: dict[str, int] = {}
    for row in rows:
        if row["case"] == "first_token":
            count = len(row["first_token_ms"])
            counts[row["load"]] = min(count, counts.get(row["load"], count))
    return counts


def step_ratios(rows: list[Row]) -> list[tuple[float, float]]:
    """Returns the ratio of each decode step with full heads, and its target."""
    ratios = []
    for (load, memory), of in times_of(rows, "decode", "median_step_ms").items():
        if memory == 1:
            ratios.append((of["one_call"] / of["stock"], SHORT_TARGET if load == SHORT else IDLE_TARGET))
        else:
            ratios.append((of["one_call"] / of["equal"], TARGET))
    return ratios


def first_token_ratios(rows: list[Row]) -> list[tuple[float, float]]:
    """Returns the ratio of each first token with full heads to stock, and its target."""
    times = times_of(rows, "first_token", "median_first_token_ms")
    return [(of["one_call"] / of["stock"], FIRST_TOKEN_TARGET) for of in times.values()]


def finding(ratios: Iterable[tuple[float, float]]) -> str:
    """Returns whether all targets are met, as a sentence.

    Args:
        ratios: Ratios, and their targets.
    """
    missed = sum(ratio > target for ratio, target in ratios)
    return f"Missed in {missed} lines." if missed else "Met in all lines."


def compared(times: dict[Case, dict[str, float]], counts: dict[str, int] | None = None) -> str:
    """Returns a table with a line for each case.

    Args:
        times: Milliseconds of each variant in each case.
        counts: Measurements of each load, for a column of them.
    """
    lines = []
    for (load, memory), of in times.items():
        number = [] if counts is None else [counts[load]]
        ratios = [f"{of['one_call'] / of[base]:.3f}" for base in ("stock", "equal")]
        lines.append([load, f"{memory:.2g}", *number, *(f"{of[variant]:.2f}" for variant in ENGINES), *ratios])
    return table(f"load memory{'' if counts is None else ' measured'} {names()} of,stock of,equal", lines)


def names() -> str:
    """Returns the variants' names as columns."""
    return " ".join(name.replace(" ", ",") for name in ENGINES.values())


def load_table(rows: list[Row]) -> str:
    """Returns a table with a line for each variant, stock vLLM first."""
    of_variant = {row["variant"]: row for row in rows}
    stock = of_variant["stock"]["output_tokens_per_s"]
    lines = []
    for variant, name in ENGINES.items():
        row = of_variant[variant]
        speed = row["output_tokens_per_s"]
        speeds = [row["mean_running"], f"{speed:,.0f}", f"{speed / stock:.2f}", row["median_first_token_s"]]
        lines.append([name, row["memory"], *speeds, row["num_first_tokens"], row["preemptions"]])
    return table("engine memory running output,tok/s of,stock first,token,(s) first,tokens preemptions", lines)
