"""argparse types, parsers and output helpers that all commands share.

A function with a parameter `word` is for argparse's `type=`: it returns the checked value, or raises
`argparse.ArgumentTypeError` with one sentence that names the metavar, the bound and the given word. argparse puts the
option's name before it.
"""

import argparse
import json
import math
import shutil
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from vllm_l2kv.field_kinds import Choice, Count, Kind, ParamError, Ratio
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.settings import CLASSES, DEFAULT_MEMORY, FullHeads, Settings, heads_by_layer

T = TypeVar("T")
PROGRAM = "vllm-l2kv"
"""Name of the script that the package installs."""
DEFAULT_LAYERS = ",".join(map(str, Settings.full_layers))
DEFAULT_PROTECTION = f"{CompressionParams.protect_first}:{CompressionParams.protect_last}"
"""Defaults of an engine as command-line words, for parsers whose help shows defaults."""
PROFILE = "file that `vllm-l2kv profile` wrote for this model"
MEMORY = "share of the whole KV cache, full layers and heads included, for which the profile chooses its settings"
WHAT_STAYS_FULL = "what stays full by the profile: whole layers or single KV heads"
BETTER_JUDGED = "heads where the profile judged them better and the tensor-parallel ranks can share them, else layers"
"""Help texts of `--kv-profile`, `--kv-memory` and `--kv-classes`, and the default of the last."""


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, which is long; `--help` shows it."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def ratio(word: str) -> float:
    """A keep ratio, 0 < R <= 1."""
    return _checked(Ratio().check, "R", word)


def count(word: str) -> int:
    """An integer, 0 <= N."""
    return _checked(Count().check, "N", word)


def positive(word: str) -> int:
    """An integer, 1 <= N."""
    return _checked(Count(1).check, "N", word)


def memory(word: str) -> float:
    """A share of the whole KV cache, 0 < M <= 1."""
    return _checked(Ratio().check, "M", word)


def taken_by(kind: Kind) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for an option with one value of this kind."""
    match kind:
        case Ratio():
            return {"type": ratio, "metavar": "R"}
        case Count(minimum):
            return {"type": positive if minimum else count, "metavar": "N"}
        case Choice(names):
            return {"choices": names}


def add_profile(add: Callable[..., Any], what: str, classes: str = BETTER_JUDGED) -> None:
    """Adds `--kv-profile`, `--kv-memory` and `--kv-classes`, which `profile.setting_of` reads.

    Args:
        add: `add_argument` of a parser, or of a group.
        what: What the profile sets for this command, as words of its help.
        classes: The default of `--kv-classes`, as words of its help.
    """
    add("--kv-profile", metavar="FILE", help=f"{PROFILE}; {what} come from it unless they are given")
    add("--kv-memory", type=memory, metavar="M", help=f"{MEMORY} (default: {DEFAULT_MEMORY})")
    add("--kv-classes", choices=CLASSES, help=f"{WHAT_STAYS_FULL} (default: {classes})")


def real(name: str, bound: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A parser of real numbers.

    Args:
        name: Letter of the metavar.
        bound: The bound as text, such as `0 <= D <= 1`.
        holds: Whether a finite number is within the bound.
    """

    def parse(word: str) -> float:
        value = number(word)
        if isinstance(value, str) or not math.isfinite(value) or not holds(value):
            raise ArgumentTypeError(f"{name} must be a number with {bound}, got {value!r}.")
        return float(value)

    return parse


def layers(word: str) -> tuple[int, ...]:
    """Layer indices, separated by commas; an empty word means no layers."""
    try:
        return tuple(Count().check("layer", json.loads(index)) for index in word.split(",") if word.strip())
    except ValueError:
        raise ArgumentTypeError(f"must be layer indices >= 0 separated by commas, such as 0,1, got {word!r}.") from None


def heads(word: str) -> FullHeads:
    """KV heads by layer: `7:0,2 12:1`, or a JSON object, as in a config file. An empty word means no heads."""
    try:
        if word.lstrip().startswith("{"):
            return heads_by_layer(json.loads(word))
        pairs = (entry.partition(":") for entry in word.split())
        return _joined({layer: [json.loads(head) for head in of.split(",")]} for layer, _, of in pairs)
    except ValueError:
        raise ArgumentTypeError(
            f"must be LAYER:HEAD,HEAD with indices >= 0, one word per layer, such as 7:0,2 12:1, got {word!r}."
        ) from None


def heads_in_words(full_heads: FullHeads) -> str:
    """Full heads in the form that `heads` reads."""
    return " ".join(f"{layer}:{','.join(map(str, of))}" for layer, of in full_heads.items())


def full_in_words(full_layers: Iterable[int], full_heads: FullHeads) -> str:
    """Full layers and heads, for tables and errors; heads are left out if there are none."""
    layers = f"full layers {', '.join(map(str, sorted(full_layers))) or 'none'}"
    return f"{layers}, full heads {heads_in_words(full_heads)}" if full_heads else layers


class _JoinHeads(argparse.Action):
    """Joins the words of one option; if the option is repeated, the last one counts."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, _joined(values))


def _joined(named: Iterable[Mapping[Any, Sequence[int]]]) -> FullHeads:
    """Merges mappings from layers to heads, some of them for the same layer.

    Raises:
        ValueError: An index of a layer or a head is invalid.
    """
    found: dict[int, tuple[int, ...]] = {}
    for mapping in named:
        for layer, of in heads_by_layer(mapping).items():
            found[layer] = found.get(layer, ()) + of
    return heads_by_layer(found)


def add_full_heads(add: Callable[..., Any], option: str) -> None:
    """Adds the option that names full heads; its value is `None` unless given.

    Args:
        add: `add_argument` of a parser, or of a group.
        option: The option's name.
    """
    add(
        option,
        type=heads,
        nargs="+",
        action=_JoinHeads,
        metavar="LAYER:HEAD,HEAD",
        help="KV heads that never compact, one word per layer, such as 7:0,2 12:1; an empty string means none",
    )


def protection(word: str) -> tuple[int, int]:
    """Numbers of protected tokens, `FIRST:LAST`."""
    first, colon, last = word.partition(":")
    if not colon:
        raise ArgumentTypeError(f"protection must be FIRST:LAST, such as 4:64, got {word!r}.")
    return count(first), count(last)


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """A parser of one of these names, for use in `list_of`, where argparse's `choices=` does not work."""

    def parse(word: str) -> str:
        if word not in names:
            raise ArgumentTypeError(f"{word!r} is not one of {listed(names)}.")
        return word

    return parse


def list_of(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A parser of one or more values, separated by commas.

    Args:
        parse: Parses one value.
    """

    def parse_list(text: str) -> list[T]:
        words = [word.strip() for word in text.split(",") if word.strip()]
        if not words:
            raise ArgumentTypeError(f"must hold at least one value, got {text!r}.")
        return [parse(word) for word in words]

    return parse_list


def listed(names: Iterable[str]) -> str:
    """Names, separated by commas, for help texts and errors."""
    return ", ".join(names)


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as `1 question` or `2 questions`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def as_typed() -> str:
    """The word by which the user can call this program again, for commands that it prints.

    It is the path that was typed, such as `.venv/bin/vllm-l2kv`; the bare name if the shell found it by `PATH`, or if
    Python was started in another way.
    """
    called = sys.argv[0]
    return called if Path(called).name == PROGRAM and called != shutil.which(PROGRAM) else PROGRAM


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """A text table: the first column is left-aligned, the others are right-aligned.

    Args:
        lines: Cells of each line; all lines have the same number.
    """
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return ["  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]) for line in lines]


def _checked(check: Callable[[str, Any], T], name: str, word: str) -> T:
    """Applies the check of a request field, with its `ParamError` turned into argparse's class of error."""
    try:
        return check(name, number(word))
    except ParamError as error:
        raise ArgumentTypeError(str(error)) from None


def number(word: str) -> Any:
    """The word as an int or a float, or unchanged if it is no number, so that a check can name it in its error."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
