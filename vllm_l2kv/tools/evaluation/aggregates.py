"""Aggregates rows of answers; tables and curves are made from aggregates.

An aggregate is also a row. It holds the fields that its answers share, their number, and the mean and standard
deviation of each metric, so that aggregates of several lengths, seeds or runs can be pooled. The excess loss, which
compares answers to the same prompt, is computed before.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from statistics import mean
from typing import Any

from vllm_l2kv.tools.evaluation.rows import Row
from vllm_l2kv.tools.evaluation.statistics import Estimate, Moments, average, moments, pooled, share

VARIANT = ("scorer", "granularity", "protect_first", "protect_last", "question")
"""How rows are chosen; older rows have no `question`, which then was seen."""
AMOUNT = ("keep_ratio", "max_tokens", "prompt_interval", "answer_interval")
"""How much is kept, by a ratio or a budget; rows of a ratio have no intervals, and older rows no `max_tokens`."""
SOURCE = ("model", "full_layers", "full_heads", "text", "seed", "continued", "length")
"""Fields that prompts of one kind share; a task may lack some."""
PROMPT = (*SOURCE, "subtask", "depth", "sample", "turn")
"""Fields that identify a prompt; answers to the same prompt are compared."""
PROVENANCE = ("device", "dtype", "vllm", "commit")
"""Where answers were computed; older rows lack these fields."""
AGGREGATE = ("task", *SOURCE, *VARIANT, *AMOUNT)
"""Fields that the answers of one aggregate share."""
ANSWER = ("task", *PROMPT, *VARIANT, *AMOUNT)
MEMORY = "memory"
"""Share of the whole cache that an answer held at its end; aggregates have the mean, older rows lack it."""
NUM_SAMPLES = "num_samples"
METRICS: Mapping[str, Mapping[str, Callable[[Moments], Estimate]]] = {
    "perplexity": {"excess loss": average, "accuracy": average},
    "passkey": {"score": share},
    "needle": {"score": share, "exact": share},
    "ruler": {"score": share},
    "copy": {"score": share},
    "chat": {"score": share},
}
"""Metrics of each task, and how each is averaged."""


def aggregates(rows: Iterable[Row]) -> list[Row]:
    """One aggregate for each task, kind of prompts, variant and amount, in the order of the rows.

    Args:
        rows: Rows of answers. Aggregates among them are kept, unless there are rows of their answers.

    Raises:
        ValueError: See `with_excess_loss`.
    """
    rows = list(rows)
    found = {_key(row, AGGREGATE): row for row in rows if is_aggregate(row)}
    groups: dict[str, list[Row]] = {}
    for row in with_excess_loss(rows):
        groups.setdefault(_key(row, AGGREGATE), []).append(row)
    found |= {key: _aggregate(group) for key, group in groups.items()}
    return list(found.values())


def is_aggregate(row: Row) -> bool:
    """Whether a row is an aggregate; otherwise it is one of an answer."""
    return NUM_SAMPLES in row


def is_whole(row: Row) -> bool:
    """Whether nothing was evicted."""
    return bool(row["keep_ratio"] == 1) and row.get("max_tokens") is None


def with_excess_loss(rows: Iterable[Row]) -> list[Row]:
    """Rows of answers without duplicates; rows with a loss also get its excess over the whole cache, in nats per token.

    Raises:
        ValueError: A row was not written by `vllm-l2kv eval`, or a prompt has no loss without compression.
    """
    answers = {_key(row, ANSWER): row for row in rows if not is_aggregate(row)}.values()
    for row in answers:
        if row.get("task") not in METRICS:
            raise ValueError(f"task of a row is {row.get('task')!r}; `vllm-l2kv eval` writes {', '.join(METRICS)}.")
    full = {prompt_of(row): row["loss"] for row in answers if "loss" in row and is_whole(row)}
    return [{**row, "excess loss": row["loss"] - _of_prompt(full, row)} if "loss" in row else row for row in answers]


def estimates(cells: Sequence[Row], task: str) -> list[dict[str, Any]]:
    """One entry for each variant and amount, with an `Estimate` under the name of each metric.

    Args:
        cells: Aggregates; those of one variant and amount are pooled.
        task: The task of the aggregates.
    """
    found = []
    for values, group in grouped(cells, *VARIANT, *AMOUNT):
        entry = dict(zip((*VARIANT, *AMOUNT), values, strict=True))
        entry |= {metric: how(moments_of(group, metric)) for metric, how in METRICS[task].items()}
        found.append(entry)
    return found


def moments_of(cells: Iterable[Row], metric: str) -> Moments:
    """Moments of a metric over all aggregates."""
    return pooled(Moments(cell[NUM_SAMPLES], **cell[metric]) for cell in cells)


def memory_of(cells: Iterable[Row]) -> float | None:
    """Mean share of the whole cache that answers held, over all aggregates; `None` if some lack it."""
    cells = list(cells)
    if not all(MEMORY in cell for cell in cells):
        return None
    held: float = sum(cell[NUM_SAMPLES] * cell[MEMORY] for cell in cells)
    num_samples: int = sum(cell[NUM_SAMPLES] for cell in cells)
    return held / num_samples


def num_prompts(cells: Iterable[Row]) -> int:
    """Number of prompts of these aggregates, which are of one model with the same full layers and heads."""
    most: dict[str, int] = {}
    for cell in cells:
        source = _key(cell, SOURCE)
        most[source] = max(most.get(source, 0), cell[NUM_SAMPLES])
    return sum(most.values())


def prompt_of(row: Row) -> str:
    """A key that answers to the same prompt share."""
    return _key(row, PROMPT)


def grouped(rows: Iterable[Row], *names: str) -> list[tuple[list[Any], list[Row]]]:
    """Groups rows by the values of these fields, in their order; a missing field is `None` and comes first."""

    def values_of(row: Row) -> list[Any]:
        return [row.get(name) for name in names]

    def order(row: Row) -> list[Any]:
        return [(value is not None, value) for value in values_of(row)]

    return [(values, list(group)) for values, group in groupby(sorted(rows, key=order), values_of)]


def _aggregate(answers: Sequence[Row]) -> Row:
    first = answers[0]
    metrics = [*(["loss"] if "loss" in first else []), *METRICS[first["task"]]]
    memories = [row[MEMORY] for row in answers if MEMORY in row]
    summed = {metric: moments([row[metric] for row in answers]) for metric in metrics}
    return {
        **{name: first[name] for name in AGGREGATE if name in first},
        **{name: _joined(row[name] for row in answers if name in row) for name in PROVENANCE if name in first},
        NUM_SAMPLES: len(answers),
        **({MEMORY: round(mean(memories), 4)} if len(memories) == len(answers) else {}),
        **{metric: {"mean": found.mean, "deviation": found.deviation} for metric, found in summed.items()},
    }


def _joined(values: Iterable[str]) -> str:
    """Distinct values, separated by commas; usually there is one."""
    return ", ".join(dict.fromkeys(values))


def _of_prompt(full: Mapping[str, float], row: Row) -> float:
    try:
        return full[prompt_of(row)]
    except KeyError:
        words = ", ".join(f"{name} {row[name]}" for name in PROMPT if name in row)
        raise ValueError(
            f"there is no row without compression for the prompt of {words}, which excess loss needs; give the file "
            "that has it too, or measure again."
        ) from None


def _key(row: Row, names: Iterable[str]) -> str:
    return json.dumps([row.get(name) for name in names])
