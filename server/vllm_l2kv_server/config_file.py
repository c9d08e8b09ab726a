"""Config files: YAML mappings of option names to values, turned into words of a command line.

The command line's parser checks those words, so a file and the command line have the same options and bounds.
"""

import copy
import difflib
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import yaml

NOT_IN_FILES = ("config", "help", "model-tag")
PATHS = ("kv-profile",)
"""Keys whose values are paths relative to the folder of the config file."""


class ConfigFileError(ValueError):
    """The file cannot be read, or has a wrong key or value; one line that names the file."""


def read_config_file(path: str, parser: ArgumentParser) -> list[str]:
    """Returns the file's options as words of a command line.

    vLLM's own `--config` is not used: it ignores unknown keys whose value is false or empty, and does not accept
    `--config=FILE`.

    Args:
        path: A YAML mapping of option names, without leading dashes, to values; a key without a value is left out, and
            values of `PATHS` are relative to its folder.
        parser: Parses the command line.

    Raises:
        ConfigFileError: Unreadable, not a mapping, an unknown key (the message suggests the nearest one), or a value
            that the option does not take.
    """
    words = []
    for key, value in read_yaml(path).items():
        name = str(key).replace("_", "-")
        if not _is_option(parser, name):
            hint = f"did you mean {nearest(name, option_names(parser))!r}?"
            raise ConfigFileError(f"{path}: unknown key {str(key)!r}; {hint}")
        if name in PATHS and isinstance(value, str):
            value = str(Path(path).parent / value)
        try:
            words += [] if value is None else _words(parser, name, value)
        except _RefusedError as error:
            raise ConfigFileError(f"{path}: {error}") from None
    return words


def read_yaml(path: str) -> dict[Any, Any]:
    """Returns the content of the file; an empty file is an empty mapping.

    Raises:
        ConfigFileError: Unreadable, or not a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigFileError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigFileError(f"{path} must hold a mapping of option names to values.")
    return content


def option_names(parser: ArgumentParser) -> list[str]:
    """Returns the names of the options that a file may set, without leading dashes or options without a default."""
    names = (name.replace("_", "-") for name in vars(parser.parse_args([])))
    return [name for name in names if name not in NOT_IN_FILES]


def nearest(name: str, known: Collection[str]) -> str:
    """Returns the known name closest to a misspelt one."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


class _RefusedError(ValueError):
    """The parser refuses some words; the message is the parser's and names the option."""


def _parse(parser: ArgumentParser, words: list[str]) -> tuple[Namespace, list[str]]:
    """Returns the parsed options and the words that belong to none.

    Raises:
        _RefusedError: Where the parser would end the process.
    """

    def refuse(message: str) -> NoReturn:
        raise _RefusedError(" ".join(message.split()))

    checker = copy.copy(parser)
    checker.error = refuse  # type: ignore[method-assign]
    return checker.parse_known_args(words)


def _is_option(parser: ArgumentParser, name: str) -> bool:
    # In a file, --no-enforce-eager is `enforce-eager: false`.
    if name in NOT_IN_FILES or name.startswith("no-") or not name.replace("-", "_").isidentifier():
        return False
    try:
        return not _parse(parser, [f"--{name}"])[1]
    except _RefusedError:  # a known option that needs a value
        return True


def _words(parser: ArgumentParser, name: str, value: Any) -> list[str]:
    match value:
        case True:
            words = [f"--{name}"]
        case False:
            words = [f"--no-{name}"]
            if _parse(parser, words)[1]:  # a switch without a --no- form is off unless named
                _parse(parser, [f"--{name}"])
                return []
        case list():
            return _words_of_list(parser, name, value)
        case dict():
            words = [f"--{name}={json.dumps(value)}"]
        case _:
            words = [f"--{name}={value}"]
    _parse(parser, words)
    return words


def _words_of_list(parser: ArgumentParser, name: str, values: list[Any]) -> list[str]:
    """Returns the first spelling of a list from which the parser reads all its values.

    Raises:
        _RefusedError: No spelling works: the option takes one value, or refuses these values.
    """
    items = [json.dumps(value) if isinstance(value, dict) else str(value) for value in values]
    spellings = (
        [f"--{name}", *items],
        [f"--{name}={item}" for item in items],
        [f"--{name}={json.dumps(values)}"],
        [f"--{name}={','.join(items)}"],
    )
    refusal = _RefusedError(f"argument --{name}: one value is expected, got {json.dumps(values)}")
    for words in spellings:
        try:
            parsed = getattr(_parse(parser, words)[0], name.replace("-", "_")) or ()
        except _RefusedError as error:
            refusal = error
            continue
        if isinstance(parsed, list | tuple) and len(parsed) == len(values):
            return words
    raise refusal
