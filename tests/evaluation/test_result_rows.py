"""Files of rows, also those of a run that was killed."""

import json
from pathlib import Path

import pytest

from vllm_l2kv.tools.evaluation.rows import append_rows, read_rows

ROWS = [{"text": "Lot\u2019s wife", "score": 1.0}, {"text": "b", "score": 0.0}]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "rows.jsonl"


def half_of_a_third(path: Path) -> None:
    """A kill during a write leaves this: it cuts a letter of three bytes."""
    row = json.dumps(ROWS[0], ensure_ascii=False).encode()
    with path.open("ab") as file:
        file.write(row[: row.index(b"\xe2") + 1])


def test_what_is_written_is_read(path):
    append_rows(path, ROWS[:1])
    append_rows(path, ROWS[1:])
    assert read_rows(path) == ROWS


def test_half_a_row_at_the_end_is_left_out_with_a_warning(path, capsys):
    append_rows(path, ROWS)
    half_of_a_third(path)
    assert read_rows(path) == ROWS
    assert capsys.readouterr().err == f"{path}:3 is an incomplete row of a run that was killed; it is skipped.\n"


def test_a_new_run_begins_a_new_line_after_half_a_row(path, capsys):
    append_rows(path, ROWS)
    half_of_a_third(path)
    append_rows(path, ROWS)
    assert read_rows(path) == ROWS + ROWS
    assert "incomplete row" in capsys.readouterr().err


def test_a_last_row_without_a_newline_is_a_row(path, capsys):
    path.write_text(json.dumps(ROWS[0]))
    assert read_rows(path) == ROWS[:1]
    append_rows(path, ROWS[1:])
    assert read_rows(path) == ROWS
    assert capsys.readouterr().err == ""


def test_every_row_is_in_the_file_before_the_next_is_asked_for(path):
    def rows():
        for number, row in enumerate(ROWS):
            assert len(read_rows(path)) == number
            yield row

    append_rows(path, rows())


@pytest.mark.parametrize("line", ['{"half": ', "[1]", "nonsense"])
def test_another_line_that_is_no_row_is_refused_by_number(path, line):
    path.write_text(f"{json.dumps(ROWS[0])}\n{line}\n{json.dumps(ROWS[1])}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 is not (a )?JSON.*; delete this line\."):
        read_rows(path)


def test_empty_lines_are_ignored(path):
    path.write_text(f"\n{json.dumps(ROWS[0])}\n\n")
    assert read_rows(path) == ROWS[:1]
