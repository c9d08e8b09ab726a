"""Values of command-line options."""

import math
import os
import sys
from argparse import ArgumentTypeError

import pytest

from vllm_l2kv.cli_types import (
    OneLineParser,
    add_full_heads,
    as_typed,
    count,
    counted,
    heads,
    layers,
    list_of,
    one_of,
    positive,
    ratio,
    real,
)

HEADS = "must be LAYER:HEAD,HEAD with indices >= 0, one word per layer, such as 7:0,2 12:1"
share = real("D", "0 <= D <= 1", lambda value: 0 <= value <= 1)


@pytest.mark.parametrize(
    ("parse", "word", "value"),
    [
        (ratio, "0.5", 0.5),
        (ratio, "1", 1.0),
        (count, "0", 0),
        (positive, "8000", 8000),
        (share, "0", 0.0),
        (share, "1", 1.0),
        (layers, "3,1", (3, 1)),
        (layers, " 0, 1 ", (0, 1)),
        (layers, "", ()),
        (heads, "7:0,2 12:1", {7: (0, 2), 12: (1,)}),
        (heads, "7:2 7:0,2", {7: (0, 2)}),
        (heads, '{"7": [2, 0]}', {7: (0, 2)}),
        (heads, "", {}),
        (heads, "{}", {}),
        (one_of(("a", "b")), "b", "b"),
        (list_of(ratio), "0.5, 0.25,", [0.5, 0.25]),
    ],
)
def test_values(parse, word, value):
    assert parse(word) == value
    assert type(parse(word)) is type(value)


@pytest.mark.parametrize(
    ("parse", "word", "message"),
    [
        (ratio, "0", "R must satisfy 0 < R <= 1, got 0."),
        (ratio, "nan", "R must satisfy 0 < R <= 1, got nan."),
        (ratio, "half", "R must be a number with 0 < R <= 1, got 'half'."),
        (count, "-1", "N must satisfy 0 <= N <= 2147483647, got -1."),
        (count, "1.5", "N must be an integer >= 0, got 1.5."),
        (count, "9" * 5000, "N must be an integer >= 0, got inf."),
        (positive, "0", "N must satisfy 1 <= N <= 2147483647, got 0."),
        (share, "1.5", "D must be a number with 0 <= D <= 1, got 1.5."),
        (share, "nan", "D must be a number with 0 <= D <= 1, got nan."),
        (share, "x", "D must be a number with 0 <= D <= 1, got 'x'."),
        (real("G", "0 < G", lambda value: value > 0), "inf", "G must be a number with 0 < G, got inf."),
        (layers, "0,-1", "must be layer indices >= 0 separated by commas, such as 0,1, got '0,-1'."),
        (layers, "0,1.0", "must be layer indices >= 0 separated by commas, such as 0,1, got '0,1.0'."),
        (heads, "7", f"{HEADS}, got '7'."),
        (heads, "[7]:0", f"{HEADS}, got '[7]:0'."),
        (heads, "7:0 x:1", f"{HEADS}, got '7:0 x:1'."),
        (heads, "7:-1", f"{HEADS}, got '7:-1'."),
        (heads, "7:1.0", f"{HEADS}, got '7:1.0'."),
        (heads, '{"7": 1}', f"{HEADS}, got '{{\"7\": 1}}'."),
        (heads, "{7: 1}", f"{HEADS}, got '{{7: 1}}'."),
        (one_of(("a", "b")), "c", "'c' is not one of a, b."),
        (list_of(ratio), "0.5,2", "R must satisfy 0 < R <= 1, got 2."),
        (list_of(ratio), " , ", "must hold at least one value, got ' , '."),
    ],
)
def test_errors(parse, word, message):
    with pytest.raises(ArgumentTypeError) as caught:
        parse(word)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], None),
        (["--heads", ""], {}),
        (["--heads", "7:0,2", "12:1", "7:1"], {7: (0, 1, 2), 12: (1,)}),
        (["--heads", "7:0", "--heads", "12:1"], {12: (1,)}),
        (['--heads={"7": [0]}'], {7: (0,)}),
    ],
)
def test_heads_of_several_words(words, value):
    parser = OneLineParser(prog="p")
    add_full_heads(parser.add_argument, "--heads")
    assert parser.parse_args(words).heads == value


def test_errors_are_one_line(capsys):
    parser = OneLineParser(prog="p")
    parser.add_argument("--ratios", type=list_of(ratio))
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--ratios", "7"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "p: error: argument --ratios: R must satisfy 0 < R <= 1, got 7.\n"


def test_a_number_too_long_for_python_is_refused():
    with pytest.raises(ArgumentTypeError):
        ratio(str(math.inf))


def test_singular_and_plural():
    assert [counted(number, "question") for number in (0, 1, 2)] == ["0 questions", "1 question", "2 questions"]


def test_the_program_as_the_user_typed_it(tmp_path, monkeypatch):
    script = tmp_path / "vllm-l2kv"
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", os.defpath)
    for typed in (".venv/bin/vllm-l2kv", str(script)):
        monkeypatch.setattr(sys, "argv", [typed])
        assert as_typed() == typed
    # The shell passes the whole path of a bare name that it finds by PATH.
    monkeypatch.setenv("PATH", str(tmp_path))
    assert as_typed() == "vllm-l2kv"
    monkeypatch.setattr(sys, "argv", ["lib/vllm_l2kv/cli.py"])
    assert as_typed() == "vllm-l2kv"
