"""Makes aggregates of the rows that `vllm-l2kv eval` wrote; they replace earlier aggregates of the same settings.

python -m benchmarks.quality.aggregate MODEL [MODEL ...]

Reads every `rows.jsonl` below benchmarks/quality/rows/MODEL, writes benchmarks/quality/results/MODEL/aggregates.jsonl.
Git ignores the rows: there are tens of thousands, and no published number needs single rows.
"""

import argparse
import json
from pathlib import Path

from vllm_l2kv.tools.evaluation.aggregates import aggregates
from vllm_l2kv.tools.evaluation.cli import ROWS
from vllm_l2kv.tools.evaluation.rows import read_rows

FOLDER = Path(__file__).parent
ROWS_OF, RESULTS = FOLDER / "rows", FOLDER / "results"
AGGREGATES = "aggregates.jsonl"


def main() -> None:
    """Writes the file of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    for model in parser.parse_args().models:
        paths = sorted((ROWS_OF / model).rglob(ROWS))
        if not paths:
            parser.error(f"argument MODEL: there is no {ROWS} below {ROWS_OF / model}; grid.py writes them")
        written = RESULTS / model / AGGREGATES
        earlier = read_rows(written) if written.exists() else []
        cells = aggregates([*earlier, *(row for path in paths for row in read_rows(path))])
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text("".join(json.dumps(cell) + "\n" for cell in cells), encoding="utf-8")


if __name__ == "__main__":
    main()
