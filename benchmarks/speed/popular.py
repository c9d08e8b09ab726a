"""Questions about 12 documents of 30,000 tokens, some more popular than others, in a cache of 16 GiB.

Each of 32 clients sends a question of 200 tokens, waits for an answer of 64, and asks again. Documents are chosen by
Zipf's law: the second half as often as the first, the third a third as often.
"""

import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.answers import Answer, Client
from benchmarks.speed.document import asked_of
from benchmarks.speed.engines import cache_of, is_measured, random_tokens

CACHE_BYTES = 16 << 30
NUM_DOCUMENTS, NUM_DOCUMENT_TOKENS, NUM_QUESTION_TOKENS, NUM_ANSWER_TOKENS = 12, 30_000, 200, 64
NUM_CLIENTS = 32
CASES = ((None, None), (0.25, None), (0.25, 7500))
"""Keep ratio and budget; `None` for none."""
SETTLE_SECONDS, MEASURED_SECONDS = 20.0, 60.0


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each case."""
    for ratio, budget in CASES:
        if not is_measured(about, ratio, None, only) or (ratio is None and about["engine"] == "l2kv"):
            continue
        loop = Loop(llm, asked_of(NUM_DOCUMENT_TOKENS, ratio, budget))
        with cache_of(llm, CACHE_BYTES // about["num_gpus"], about["block_bytes"]):
            loop.warm_up()
            measured = loop.measure()
        yield {
            "cache_bytes": CACHE_BYTES,
            "keep_ratio": ratio or 1.0,
            "budget": budget,
            "num_documents": NUM_DOCUMENTS,
            "num_clients": NUM_CLIENTS,
            **measured,
        }


class Loop:
    """Clients that each wait for an answer before they ask again."""

    def __init__(self, llm: Any, asked: dict[str, Any]) -> None:
        self._client, self._asked = Client(llm, "popular"), asked
        self._documents = [random_tokens([8, i], NUM_DOCUMENT_TOKENS) for i in range(NUM_DOCUMENTS)]
        self._chance = random.Random(8)
        self._num_asked = 0

    def warm_up(self) -> None:
        """Asks about each document once, the most popular one last, then as in the measurement."""
        for number in reversed(range(NUM_DOCUMENTS)):
            self._client.ask(self._prompt(number), 1, **self._asked)
        self._run_for(SETTLE_SECONDS)

    def measure(self) -> dict[str, Any]:
        """Counts for a while, then ends all requests."""
        begin = time.perf_counter()
        begun, num_tokens = self._run_for(MEASURED_SECONDS)
        seconds = time.perf_counter() - begin
        self._client.abort()
        milliseconds = [answer.first_token_ms for answer in begun]
        num_cached = sum(answer.cached_tokens for answer in begun)
        return {
            "num_first_tokens": len(begun),
            "median_first_token_ms": round(statistics.median(milliseconds), 1),
            "p99_first_token_ms": round(statistics.quantiles(milliseconds, n=100, method="inclusive")[-1], 1),
            "output_tokens_per_s": round(num_tokens / seconds, 1),
            "hit_rate": round(num_cached / sum(answer.num_prompt_tokens for answer in begun), 4),
            "seconds": round(seconds, 1),
        }

    def _run_for(self, seconds: float) -> tuple[list[Answer], int]:
        """Runs steps for that long; returns the answers that began, and the number of tokens."""
        begin = time.perf_counter()
        answers = list(self._client.unfinished.values())
        num_before = sum(len(answer.token_ids) for answer in answers)
        while time.perf_counter() - begin < seconds:
            while len(self._client.unfinished) < NUM_CLIENTS:
                answers.append(self._ask())
            self._client.step()
        num_tokens = sum(len(answer.token_ids) for answer in answers) - num_before
        return [answer for answer in answers if (answer.first_token_at or 0) > begin], num_tokens

    def _ask(self) -> Answer:
        weights = [1 / (rank + 1) for rank in range(NUM_DOCUMENTS)]
        (number,) = self._chance.choices(range(NUM_DOCUMENTS), weights)
        return self._client.add(self._prompt(number), NUM_ANSWER_TOKENS, **self._asked)

    def _prompt(self, number: int) -> list[int]:
        self._num_asked += 1
        return self._documents[number] + random_tokens([9, self._num_asked], NUM_QUESTION_TOKENS)
