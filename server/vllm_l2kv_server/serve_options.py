"""Options of `vllm-l2kv serve` that vLLM does not have.

This module imports neither vLLM nor a web framework: bad options are refused before either is imported.
"""

import argparse
import json
from typing import Any

from vllm_l2kv.cli_types import (
    BETTER_JUDGED,
    DEFAULT_LAYERS,
    MEMORY,
    PROFILE,
    WHAT_STAYS_FULL,
    add_full_heads,
    add_profile,
    layers,
    positive,
    taken_by,
)
from vllm_l2kv.field_kinds import Count, Ratio
from vllm_l2kv.params import FIELDS_WITH_DEFAULTS, Field
from vllm_l2kv.settings import CLASSES, DEFAULT_MEMORY, Settings

PROG = "vllm-l2kv serve"
MAX_BODY_OPTION = "--max-body-mib"
INTERVALS = {
    "kv-prompt-interval": ("prompt_interval", "before the end of its prompt"),
    "kv-answer-interval": ("answer_interval", "from the end of its prompt on"),
}
"""For each option, its attribute of `Settings` and the part of a request that it applies to."""
DEFAULT_MAX_BODY_MIB = 64
"""Enough for 48 MiB of pictures or sound in base64, or for a prompt of millions of tokens, as text or as ids."""


def own_options() -> argparse.ArgumentParser:
    """Returns a parser of the options that vLLM does not have.

    Options that a profile may set are `None` unless given.
    """
    parser = argparse.ArgumentParser(prog=PROG, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("KV-cache compression")
    group.add_argument(
        "--kv-full-layers",
        type=layers,
        metavar="I,J,...",
        help=f"layers that never compact; an empty string means none (default: {DEFAULT_LAYERS}, the paper's)",
    )
    add_full_heads(group.add_argument, "--kv-full-heads")
    add_profile(group.add_argument, "what stays full, and the default ratio, scorer and granularity")
    for field in FIELDS_WITH_DEFAULTS:
        what = field.description[0].lower() + field.description[1:].rstrip(".")
        group.add_argument(
            field.option,
            **taken_by(field.kind),
            help=f"{what}; unless a request says otherwise (default: {_shown(field)})",
        )
    for option, (attribute, where) in INTERVALS.items():
        group.add_argument(
            f"--{option}",
            type=positive,
            default=getattr(Settings, attribute),
            metavar="N",
            help=f"rows beyond kv_max_tokens that a request may hold {where} until it is compacted "
            f"(default: {getattr(Settings, attribute)})",
        )
    group = parser.add_argument_group("Requests")
    group.add_argument(
        MAX_BODY_OPTION,
        type=positive,
        default=DEFAULT_MAX_BODY_MIB,
        metavar="N",
        help=f"a request whose body is longer than N MiB gets 413 (default: {DEFAULT_MAX_BODY_MIB})",
    )
    group.add_argument(
        "--playground",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="serve a page at /playground that compares two keep ratios; the page needs no API key, but its requests "
        "do (default: on)",
    )
    group = parser.add_argument_group("Output")
    group.add_argument(
        "--verbose",
        action=argparse.BooleanOptionalAction,
        help="print the log of all processes; otherwise it goes to a file, and phases of the start, requests and "
        "errors are shown (default: off on a terminal, on everywhere else)",
    )
    return parser


def config_schema() -> str:
    """Returns the JSON schema of these options as keys of a config file, for editors; vLLM's keys are left open."""
    keys: dict[str, Any] = {
        "kv-full-layers": {
            "description": "Layers that never compact.",
            "type": ["array", "integer", "string"],
            "items": {"type": "integer", "minimum": 0},
            "default": list(Settings.full_layers),
        },
        "kv-full-heads": {
            "description": "For each layer, a list of its KV heads that never compact.",
            "type": ["object", "string"],
            "additionalProperties": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "default": {},
        },
        "kv-profile": {
            "description": "A " + PROFILE + ", relative to the folder of the config file. It sets those of "
            "kv-full-layers or kv-full-heads, kv-default-keep-ratio, kv-scorer and kv-granularity that are not given.",
            "type": "string",
        },
        "kv-memory": {
            "description": MEMORY[0].upper() + MEMORY[1:] + ".",
            **Ratio().schema(),
            "default": DEFAULT_MEMORY,
        },
        "kv-classes": {
            "description": f"{WHAT_STAYS_FULL[0].upper()}{WHAT_STAYS_FULL[1:]}; by default {BETTER_JUDGED}.",
            "enum": list(CLASSES),
        },
    }
    for field in FIELDS_WITH_DEFAULTS:
        keys[field.option.removeprefix("--")] = {
            "description": field.description,
            **field.kind.schema(),
            **({} if field.default is None else {"default": field.default}),
        }
    for option, (attribute, where) in INTERVALS.items():
        keys[option] = {
            "description": f"Rows beyond kv_max_tokens that a request may hold {where} until it is compacted.",
            **Count(1).schema(),
            "default": getattr(Settings, attribute),
        }
    keys[MAX_BODY_OPTION.removeprefix("--")] = {
        "description": "A request whose body is longer than this many MiB gets 413.",
        "type": "integer",
        "minimum": 1,
        "default": DEFAULT_MAX_BODY_MIB,
    }
    keys["playground"] = {
        "description": "Serve a page at /playground that compares two keep ratios.",
        "type": "boolean",
        "default": True,
    }
    keys["verbose"] = {
        "description": "Print the log of all processes; otherwise it goes to a file, and phases of the start, requests "
        "and errors are shown. Without this key: off on a terminal, on everywhere else.",
        "type": "boolean",
    }
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Config file of vllm-l2kv serve; keys of vLLM's options are not listed",
        "type": "object",
        "properties": keys,
        "additionalProperties": True,
    }
    return json.dumps(schema, indent=2) + "\n"


def _shown(field: Field) -> Any:
    return "none" if field.default is None else field.default
