"""Files of rows, with one JSON object per line. A run that was killed may leave an incomplete last line."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_l2kv.cli_types import heads_in_words
from vllm_l2kv.settings import FullHeads

Row = Mapping[str, Any]


def about_heads(full_heads: FullHeads) -> dict[str, str]:
    """The field of rows for full heads, in the form of the option; empty if there are none, as in older rows."""
    return {"full_heads": heads_in_words(full_heads)} if full_heads else {}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file. An incomplete last line is skipped, with a warning on standard error.

    Raises:
        OSError: The file cannot be read.
        ValueError: Another line is not a JSON object.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    rows = [_parsed(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if rest:
        try:
            rows.append(_parsed(rest, path, len(lines) + 1))
        except ValueError:
            sys.stderr.write(f"{path}:{len(lines) + 1} is an incomplete row of a run that was killed; it is skipped.\n")
    return rows


def prepare_for_more(path: Path) -> list[Row]:
    """Deletes an incomplete last line of a file, so that the next row starts on its own line.

    Returns:
        The other rows.

    Raises:
        ValueError: A line is not a JSON object.
    """
    _end_with_a_whole_line(path)
    return read_rows(path)


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Appends each row as soon as it is produced, after deleting an incomplete last line."""
    if path.exists():
        _end_with_a_whole_line(path)
    # Line-buffered, so that a run that is killed leaves at most one incomplete row.
    with path.open("a", buffering=1, encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _end_with_a_whole_line(path: Path) -> None:
    """Deletes an incomplete last line of a file; a complete one without a newline gets it."""
    content = path.read_bytes()
    rest = content.rpartition(b"\n")[2]
    if not rest:
        return
    try:
        json.loads(rest)
    except ValueError:
        sys.stderr.write(f"The last line of {path} is an incomplete row of a run that was killed; it is deleted.\n")
        os.truncate(path, len(content) - len(rest))
    else:
        with path.open("ab") as file:
            file.write(b"\n")


def _parsed(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}:{number} is not JSON ({error}); delete this line.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}:{number} is not a JSON object; delete this line.")
    return row
