"""Texts for tasks: files, or bundled samples in the public domain."""

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

SAMPLES = ("moby_dick", "state_of_the_union")
"""Bundled samples: a novel, and speeches in place of essays."""


def read_text(name: str) -> str:
    """Reads a bundled sample by its name, or a file.

    Raises:
        OSError: The file cannot be read.
        UnicodeDecodeError: The file is not UTF-8.
    """
    if name in SAMPLES:
        return files("vllm_l2kv.tools.evaluation").joinpath("texts", f"{name}.txt").read_text(encoding="utf-8")
    return Path(name).read_text(encoding="utf-8")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, beginning with the tokenizer's BOS if it has one.

    Not every tokenizer adds the BOS itself, and some models fail without it.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    token_ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return bos + token_ids


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two lists of token ids."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def largest(high: int, fits: Callable[[int], bool]) -> int:
    """The largest number in `0..high` for which `fits` is true; 0 is assumed to fit, and `fits` to be monotonic.

    Tries small numbers first, since large ones make long prompts.
    """
    low, step = 0, 1
    while low + step <= high and fits(low + step):
        low, step = low + step, 2 * step
    high = min(high, low + step - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
