"""Result rows: one JSON object a line, each naming where it was measured."""

import json
import os
import sys
from pathlib import Path
from typing import Any


def where() -> dict[str, str]:
    """The GPU, and the commit as the variable `COMMIT` names it."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "commit": os.environ.get("COMMIT", "")}


def append(file: Path, row: dict[str, Any]) -> None:
    """Adds a row to a file and shows it."""
    line = json.dumps(row)
    with file.open("a") as out:
        out.write(line + "\n")
    sys.stdout.write(f"{file.stem} {line}\n")
    sys.stdout.flush()
