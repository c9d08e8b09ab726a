"""Expected `usage.kv_cache` of a finished request, for tests."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

DEMO_SHARE = Fraction(2, 30)
"""Share of full layers in the demo model, by default."""
TINY_SHARE = Fraction(1, 4)
"""Share of one layer in a tiny model."""


def memory_ratio(num_rows: int, num_tokens: int, full_share: Fraction) -> float:
    """Returns the memory of the whole cache: full layers hold all tokens, the others these rows."""
    return round(float(full_share + (1 - full_share) * Fraction(num_rows, num_tokens)), 4)


def usage(
    prompt: int,
    answer: int,
    evicted: int = 0,
    compactions: int | None = None,
    full_share: Fraction = Fraction(1, 5),
    **others: Any,
) -> dict[str, Any]:
    """Returns the numbers of a request; its last token takes no row.

    Args:
    prompt: Number of tokens of its prompt.
    answer: Number of tokens of its answer, at least 1.
    evicted: Number of evicted tokens.
    compactions: Number of compactions; by default one if anything was evicted.
    full_share: Share of full layers; by default that of schedulers in these tests.
    others: `max_tokens` or `reason`, if it has them.
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
    """Returns the numbers in vLLM's `output` without the memory ratio, which must be possible for some full layers."""
    numbers = dict(output.kv_transfer_params["kv_cache"])
    ratio, kept = numbers.pop("memory_ratio"), numbers["kept_tokens"]
    assert kept / (kept + numbers["evicted_tokens"]) - 5e-5 <= ratio <= 1, numbers
    return numbers


def together(numbers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers of an answer to several prompts with these numbers; only counts are summed."""
    sizes = [one["kept_tokens"] + one["evicted_tokens"] for one in numbers]
    held = sum(one["memory_ratio"] * size for one, size in zip(numbers, sizes, strict=True))
    total = {name: sum(one[name] for one in numbers) for name in numbers[0]}
    return {**total, "memory_ratio": round(held / sum(sizes), 4)}
