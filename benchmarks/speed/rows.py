"""Result rows: one JSON object per line, each with the device and commit that it was measured on."""

import json
import os
import sys
from pathlib import Path
from typing import Any


def where() -> dict[str, str]:
    """Returns the GPU, and the commit from the variable `COMMIT`."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "commit": os.environ.get("COMMIT", "")}


def append(file: Path, row: dict[str, Any]) -> None:
    """Adds a row to a file and prints it."""
    line = json.dumps(row)
    with file.open("a") as out:
        out.write(line + "\n")
    sys.stdout.write(f"{file.stem} {line}\n")
    sys.stdout.flush()
