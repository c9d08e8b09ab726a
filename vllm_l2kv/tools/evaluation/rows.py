"""Rows in a file, one JSON object a line. A run that was killed may leave half a line at its end."""

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
    """What rows say of full heads: the words that one would type; nothing if there are none, as in older rows."""
    return {"full_heads": heads_in_words(full_heads)} if full_heads else {}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file. Half a line at its end is left out, with a warning on standard error.

    Raises:
        OSError: There is no such file.
        ValueError: Another line is no row.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    rows = [_parsed(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if rest:
        try:
            rows.append(_parsed(rest, path, len(lines) + 1))
        except ValueError:
            sys.stderr.write(f"{path}:{len(lines) + 1} is half a row, of a run that was killed; it is left out.\n")
    return rows


def prepare_for_more(path: Path) -> list[Row]:
    """Deletes half a row at the end of a file, to which the next row would be glued.

    Returns:
        The other rows.

    Raises:
        ValueError: One of them is no row.
    """
    _end_with_a_whole_line(path)
    return read_rows(path)


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows, each of them as soon as it is there; half a line at the end of the file is deleted first."""
    if path.exists():
        _end_with_a_whole_line(path)
    # By the line: a run that is killed leaves whole rows but for the last one.
    with path.open("a", buffering=1, encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _end_with_a_whole_line(path: Path) -> None:
    """Deletes half a row at the end of a file; a whole one there gets its newline."""
    content = path.read_bytes()
    rest = content.rpartition(b"\n")[2]
    if not rest:
        return
    try:
        json.loads(rest)
    except ValueError:
        sys.stderr.write(f"The end of {path} is half a row, of a run that was killed; it is deleted.\n")
        os.truncate(path, len(content) - len(rest))
    else:
        with path.open("ab") as file:
            file.write(b"\n")


def _parsed(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}:{number} is no JSON ({error}); delete this line.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}:{number} is no JSON object; delete this line.")
    return row
