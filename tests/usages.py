"""`usage.kv_cache` of a finished request, stated for tests by what they know of it."""

from typing import Any


def usage(prompt: int, answer: int, evicted: int = 0, compactions: int | None = None, **others: Any) -> dict[str, Any]:
    """What a request of so many tokens reports: its last token takes no row.

    Args:
        prompt: Tokens of its prompt.
        answer: Tokens of its answer, at least 1.
        evicted: Tokens that were evicted.
        compactions: How often it was compacted; once by default if anything was evicted.
        others: `max_tokens` or `reason`, where it has them.
    """
    return {
        "prompt_tokens": prompt,
        "kept_tokens": prompt + answer - 1 - evicted,
        "evicted_tokens": evicted,
        "compactions": int(evicted > 0) if compactions is None else compactions,
        **others,
    }
