"""A YAML file of options, turned into the command line that it stands for."""

import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml


class ConfigFileError(ValueError):
    """The file cannot be read or says something that is no option; one line, naming the file."""


def read_config_file(path: str, options: Collection[str], comma_lists: Collection[str] = ()) -> list[str]:
    """What one would have typed.

    vLLM's own `--config` is not used: it passes over unknown keys in silence when they are false or empty, and knows
    no `--config=FILE`.

    Args:
        path: A YAML mapping of option names, without dashes in front, to values.
        options: Known options, such as `--max-model-len`.
        comma_lists: Those of them that take a list as one comma-separated word.

    Raises:
        ConfigFileError: Unreadable, not a mapping, or an unknown key; the message holds the nearest known one.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigFileError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ConfigFileError(f"{path} must hold a mapping of option names to values.")
    words = []
    for key, value in content.items():
        option = "--" + str(key).replace("_", "-")
        if option not in options:
            nearest = difflib.get_close_matches(option, options, n=1, cutoff=0.0)[0].removeprefix("--")
            raise ConfigFileError(f"{path}: unknown key {str(key)!r}; did you mean {nearest!r}?")
        words += _words(option, value, options, option in comma_lists)
    return words


def _words(option: str, value: Any, options: Collection[str], is_comma_list: bool) -> list[str]:
    if value is None:
        return []
    if value is True:
        return [option]
    if value is False:
        # A switch without a `--no-` form is off unless named.
        no_option = f"--no-{option.removeprefix('--')}"
        return [no_option] if no_option in options else []
    if isinstance(value, dict):
        return [f"{option}={json.dumps(value)}"]
    if isinstance(value, list):
        if is_comma_list:
            return [f"{option}={','.join(map(str, value))}"]
        return [option, *map(str, value)] if value else []
    return [f"{option}={value}"]
