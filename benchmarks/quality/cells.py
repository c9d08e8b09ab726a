"""Makes cells of the rows that grid.py wrote: for each setting, the scores of all prompts in order.

python -m benchmarks.quality.cells OUT NAME

Reads OUT, writes benchmarks/quality/results/NAME/cells.jsonl. All cells of a length and a task have the same prompts,
so differences can be taken prompt by prompt.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality.grid import ROWS, SETTINGS
from benchmarks.quality.settings import METHODS, WHOLE, Full, Setting
from vllm_l2kv.tools.evaluation.aggregates import PROVENANCE, is_whole, prompt_of, with_excess_loss
from vllm_l2kv.tools.evaluation.rows import read_rows

RESULTS = Path(__file__).parent / "results"
CELLS = "cells.jsonl"
Row = Mapping[str, Any]
KIND = ("scorer", "keep_ratio", "granularity", "length", "task", "question")
"""Fields that the rows of one cell share, with full layers and heads."""


def main() -> None:
    """Writes the file of a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of grid.py")
    parser.add_argument("name", metavar="NAME", help="folder below benchmarks/quality/results")
    args = parser.parse_args()
    rows = [row for path in sorted((args.out / ROWS).glob("*.jsonl")) for row in read_rows(path)]
    made = cells([Setting(**row) for row in read_rows(args.out / SETTINGS)], rows)
    path = RESULTS / args.name / CELLS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(cell) + "\n" for cell in made), encoding="utf-8")


def cells(settings: Iterable[Setting], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns a cell for each setting, length, task and question that was measured.

    Raises:
        ValueError: Cells of one length and task have different numbers of prompts: the grid is not complete.
    """
    # With the whole cache it does not matter which layers and heads are full: one engine measures it for all.
    wholes, sets = [row for row in rows if is_whole(row)], {_full(row) for row in rows}
    copies = ({**row, "full_layers": list(layers), "full_heads": heads} for row in wholes for layers, heads in sets)
    answers = with_excess_loss([*({"full_heads": "", **row} for row in rows), *copies])
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in answers:
        key = (_full(row), *(row[name] for name in KIND))
        groups.setdefault(key, {})[prompt_of(row)] = row
    measured = list(dict.fromkeys(key[4:] for key in groups))
    found = [
        _cell(setting, *kind, groups[key])
        for setting in settings
        for kind in measured
        if (key := (setting.full, setting.scorer, setting.keep_ratio, setting.granularity, *kind)) in groups
    ]
    _check_prompts(found)
    return found


def _full(row: Row) -> Full:
    """Returns full layers and heads; rows of engines without full heads have no such field."""
    return tuple(row["full_layers"]), row.get("full_heads", "")


def _cell(setting: Setting, length: int, task: str, question: str, answers: Mapping[str, Row]) -> dict[str, Any]:
    first = next(iter(answers.values()))
    metric = "loss" if setting.method == WHOLE else "excess loss"
    ordered = [answers[prompt] for prompt in sorted(answers)]
    return {
        "task": task,
        "model": first["model"],
        "length": length,
        "question": question,
        **setting.as_row(),
        **{name: ", ".join(dict.fromkeys(str(row[name]) for row in ordered)) for name in PROVENANCE},
        "held": round(mean(row["memory"] for row in ordered), 4),
        "scores": [round(row[metric if "loss" in row else "score"], 4) for row in ordered],
    }


def _check_prompts(found: Sequence[Row]) -> None:
    numbers: dict[tuple[int, str], set[int]] = {}
    for cell in found:
        numbers.setdefault((cell["length"], cell["task"]), set()).add(len(cell["scores"]))
    for (length, task), several in numbers.items():
        if len(several) > 1:
            raise ValueError(
                f"{task} at {length} tokens: cells have {sorted(several)} prompts; run grid.py to its end."
            )


if __name__ == "__main__":
    assert WHOLE not in METHODS
    main()
