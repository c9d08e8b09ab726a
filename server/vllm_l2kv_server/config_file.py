"""A YAML file of options, turned into the command line that it stands for."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator
from jsonschema.exceptions import best_match

from vllm_l2kv_server.config_keys import Key


class ConfigFileError(ValueError):
    """The file cannot be read or says something that is no option; one line, naming the file."""


def read_config_file(path: str, keys: Mapping[str, Key]) -> list[str]:
    """What one would have typed.

    vLLM's own `--config` is not used: it passes over unknown keys in silence when they are false or empty, and knows
    no `--config=FILE`.

    Args:
        path: A YAML mapping of option names, without dashes in front, to values; a key without a value is not given.
        keys: Known options.

    Raises:
        ConfigFileError: Unreadable, not a mapping, an unknown key, with the nearest known one, or a value that the
            option cannot take.
    """
    content = read_yaml(path)
    words = []
    for name, value in content.items():
        key = keys.get(str(name).replace("_", "-"))
        if key is None:
            nearest = difflib.get_close_matches(str(name).replace("_", "-"), keys, n=1, cutoff=0.0)[0]
            raise ConfigFileError(f"{path}: unknown key {str(name)!r}; did you mean {nearest!r}?")
        if value is None:
            continue
        if error := best_match(Draft7Validator(key.schema).iter_errors(value)):
            raise ConfigFileError(f"{path}: {name}: {error.message}")
        words += key.words(value)
    return words


def read_yaml(path: str) -> dict[Any, Any]:
    """What the file says; nothing if it is empty.

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
