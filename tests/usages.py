"""`usage.kv_cache` of a finished request, stated for tests by what they know of it."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

DEMO_SHARE = Fraction(2, 30)
"""Full layers of the demo model, by default, of all its layers."""
TINY_SHARE = Fraction(1, 4)
"""One layer of a tiny model."""


def memory_ratio(num_rows: int, num_tokens: int, full_share: Fraction) -> float:
    """Memory of the whole cache: full layers hold all tokens, the others these rows."""
    return round(float(full_share + (1 - full_share) * Fraction(num_rows, num_tokens)), 4)


def usage(
    prompt: int,
    answer: int,
    evicted: int = 0,
    compactions: int | None = None,
    full_share: Fraction = Fraction(1, 5),
    **others: Any,
) -> dict[str, Any]:
    """What a request of so many tokens reports: its last token takes no row.

    Args:
        prompt: Tokens of its prompt.
        answer: Tokens of its answer, at least 1.
        evicted: Tokens that were evicted.
        compactions: How often it was compacted; once by default if anything was evicted.
        full_share: Full layers of all layers; by default as schedulers of these tests have them.
        others: `max_tokens` or `reason`, where it has them.
    """
    num_tokens = prompt + answer - 1
    return {
        "prompt_tokens": prompt,
        "kept_tokens": num_tokens - evicted,
        "evicted_tokens": evicted,
        "compactions": int(evicted > 0) if compactions is None else compactions,
        "memory_ratio": memory_ratio(num_tokens - evicted, num_tokens, full_share),
        **others,
    }


def numbers_of(output: Any) -> dict[str, Any]:
    """What vLLM's `output` says of its cache, less the memory ratio, which must lie where any full layers put it."""
    numbers = dict(output.kv_transfer_params["kv_cache"])
    ratio, kept = numbers.pop("memory_ratio"), numbers["kept_tokens"]
    assert kept / (kept + numbers["evicted_tokens"]) - 5e-5 <= ratio <= 1, numbers
    return numbers


def together(numbers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What an answer to several prompts says, each of which would say one of these: counts alone are added up."""
    sizes = [one["kept_tokens"] + one["evicted_tokens"] for one in numbers]
    held = sum(one["memory_ratio"] * size for one, size in zip(numbers, sizes, strict=True))
    total = {name: sum(one[name] for one in numbers) for name in numbers[0]}
    return {**total, "memory_ratio": round(held / sum(sizes), 4)}
