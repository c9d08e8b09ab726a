"""Values of command-line options: every refusal is one line that names the bound."""

import argparse
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vllm_l2kv.params import ParamError, check_count, check_keep_ratio


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is long, and `--help` shows it."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def ratio(text: str) -> float:
    """A keep ratio, 0 < R <= 1.

    Raises:
        ArgumentTypeError: It is none.
    """
    try:
        return check_keep_ratio("R", number(text))
    except ParamError as error:
        raise ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A number of things, 0 or more.

    Raises:
        ArgumentTypeError: It is none.
    """
    try:
        return check_count("N", number(text))
    except ParamError as error:
        raise ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """A number of things, 1 or more.

    Raises:
        ArgumentTypeError: It is none.
    """
    if (value := count(text)) < 1:
        raise ArgumentTypeError(f"N must satisfy 1 <= N, got {value}.")
    return value


def number(text: str) -> Any:
    """A number, or the text itself for a check to refuse by name."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def list_of(parse: Callable[[str], Any], may_be_empty: bool = False) -> Callable[[str], list[Any]]:
    """What reads values with commas between them."""

    def parse_list(text: str) -> list[Any]:
        words = [word.strip() for word in text.split(",") if word.strip()]
        if not words and not may_be_empty:
            raise ArgumentTypeError("at least one is needed.")
        try:
            return [parse(word) for word in words]
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None

    return parse_list


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """What reads one of these names."""

    def check(word: str) -> str:
        if word not in names:
            raise ArgumentTypeError(f"{word!r} is not one of {listed(names)}.")
        return word

    return check


def listed(names: Sequence[str]) -> str:
    """Names with commas between them, for messages and help."""
    return ", ".join(names)
