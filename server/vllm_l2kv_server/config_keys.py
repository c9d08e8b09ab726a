"""What a config file may say: the options of a parser as keys, each with the JSON schema of its values."""

import argparse
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_l2kv.cli_types import count, layers, positive, ratio

NOT_IN_FILES = ("--config", "--help")
INTEGER_WITH_UNIT = {"type": ["integer", "string"]}
OBJECT = {"type": ["object", "string"]}
WORD = {"type": ["string", "number"]}
TYPES: Mapping[Any, dict[str, Any]] = {
    None: {"type": "string"},
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    json.loads: {"type": ["array", "object", "string"]},
    count: {"type": "integer", "minimum": 0},
    positive: {"type": "integer", "minimum": 1},
    ratio: {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    layers: {"type": ["array", "integer", "string"], "items": {"type": "integer", "minimum": 0}},
}
"""What argparse turns words into, and the values that stand for such words."""
TYPES_BY_NAME = {
    "human_readable_int": INTEGER_WITH_UNIT,
    "human_readable_int_or_auto": INTEGER_WITH_UNIT,
    "parse_dataclass": OBJECT,
    "union_dict_and_str": OBJECT,
}
"""The same for functions of vLLM; the parser alone checks what stands neither here nor there, a `WORD`."""
WRAPPERS = ("_optional_type", "_parse_type")
"""Of vLLM, around the function that turns the word into a value."""
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)\. ")
MAX_DESCRIPTION = 120


@dataclass(frozen=True)
class Key:
    """An option as a key of a file.

    Attributes:
        option: With its dashes.
        action: Of argparse.
        schema: JSON schema of its values.
    """

    option: str
    action: argparse.Action
    schema: dict[str, Any]

    def words(self, value: Any) -> list[str]:
        """What one would have typed.

        Args:
            value: Good by the schema.
        """
        if value is True:
            return [self.option]
        if value is False:
            # A switch without a `--no-` form is off unless named.
            return [word for word in self.action.option_strings if word == f"--no-{self.option.removeprefix('--')}"]
        if not isinstance(value, dict | list):
            return [f"{self.option}={value}"]
        if "object" in self.schema.get("type", ()):
            return [f"{self.option}={json.dumps(value)}"]
        if self.action.type is layers:
            return [f"{self.option}={','.join(map(str, value))}"]
        if isinstance(self.action, argparse._AppendAction):
            return [f"{self.option}={item}" for item in value]
        return [self.option, *map(str, value)] if value else []


def keys_of(parser: argparse.ArgumentParser) -> dict[str, Key]:
    """Every long option, apart from `--no-` forms, by its name without dashes."""
    keys = {}
    for action in parser._actions:
        for option in action.option_strings:
            negates = isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-")
            if option.startswith("--") and option not in NOT_IN_FILES and not negates:
                keys[option.removeprefix("--")] = Key(option, action, _schema_of(action))
    return keys


def schema_text(keys: Mapping[str, Key]) -> str:
    """The JSON schema of a file, for editors: a line for each key."""
    properties = ",\n".join(f"    {json.dumps(name)}: {json.dumps(key.schema)}" for name, key in sorted(keys.items()))
    return f"""{{
  "$schema": "http://json-schema.org/draft-07/schema#",
  "title": "Options of vllm-l2kv serve, written by `vllm-l2kv config-schema`",
  "type": "object",
  "additionalProperties": false,
  "properties": {{
{properties}
  }}
}}
"""


def _schema_of(action: argparse.Action) -> dict[str, Any]:
    schema = _several(action, _one(action))
    default = list(action.default) if isinstance(action.default, tuple) else action.default
    if isinstance(default, bool | int | float) or (default and isinstance(default, str | list)):
        schema["default"] = default
    if sentence := SENTENCE_END.split(" ".join((action.help or "").split()))[0]:
        schema["description"] = textwrap.shorten(sentence, MAX_DESCRIPTION, placeholder=" ...")
    return schema


def _one(action: argparse.Action) -> dict[str, Any]:
    """Schema of one value."""
    if action.nargs == 0:
        return {"type": "boolean"}
    if action.choices is not None:
        return {"enum": list(action.choices)}
    parse: Callable[[str], Any] | None = action.type  # type: ignore[assignment]
    while getattr(parse, "__name__", None) in WRAPPERS:
        parse = inspect.getclosurevars(parse).nonlocals["return_type"]  # type: ignore[arg-type]
    return dict(TYPES.get(parse) or TYPES_BY_NAME.get(getattr(parse, "__name__", ""), WORD))


def _several(action: argparse.Action, one: dict[str, Any]) -> dict[str, Any]:
    """Schema of values where an option takes more than one, or none."""
    if action.nargs == "?" and one.get("type") == "string":
        return {"type": ["string", "boolean"]}
    if action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction):
        return {"anyOf": [one, {"type": "array", "items": one}]}
    return one
