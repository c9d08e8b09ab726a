"""How many documents of 30,000 tokens stay findable in a cache of 16 GiB.

Documents are asked about one after another, then again, the latest first, until one is not found. With a budget a
document is compacted during its prefill, so it takes less room then. With full layers {0, 1} of 32, a ratio of 0.2
leaves a quarter of the whole cache.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.speed.answers import Client
from benchmarks.speed.document import asked_of
from benchmarks.speed.engines import cache_of, is_measured, random_tokens

CACHE_BYTES = 16 << 30
NUM_DOCUMENT_TOKENS, NUM_QUESTION_TOKENS, NUM_SHORT_TOKENS = 30_000, 200, 16
"""The second question is short, so that it takes hardly any room."""
# (keep ratio or None, budget or None, documents asked about)
CASES = ((None, None, 7), (0.25, None, 20), (0.2, None, 20), (0.25, 7500, 20))


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each case."""
    for number, (ratio, budget, num_documents) in enumerate(CASES):
        if not is_measured(about, ratio, str(budget or ratio or 1.0), only):
            continue
        client, asked = Client(llm, f"findable-{number}"), asked_of(NUM_DOCUMENT_TOKENS, ratio, budget)
        documents = [random_tokens([5, number, i], NUM_DOCUMENT_TOKENS) for i in range(num_documents)]
        with cache_of(llm, CACHE_BYTES // about["num_gpus"], about["block_bytes"]):
            for i, document in enumerate(documents):
                client.ask(document + random_tokens([6, number, i], NUM_QUESTION_TOKENS), 1, **asked)
            num_found = count_found(client, documents, asked, min(size for _, size in about["groups"]))
        yield {
            "cache_bytes": CACHE_BYTES,
            "keep_ratio": ratio or 1.0,
            "budget": budget,
            "num_document_tokens": NUM_DOCUMENT_TOKENS,
            "num_documents": num_documents,
            "num_found": num_found,
        }


def count_found(client: Client, documents: list[list[int]], asked: dict[str, Any], block_size: int) -> int:
    """Asks again, the latest first, until a document is not found; returns how many were, up to a partial block."""
    for num_found, document in enumerate(reversed(documents)):
        answer = client.ask(document + random_tokens([7, num_found], NUM_SHORT_TOKENS), 1, **asked)
        if answer.cached_tokens <= len(document) - block_size:
            return num_found
    return len(documents)
