"""One document, many questions: time to first token of the first and the second, and memory of many at once.

A document of 30,000 tokens and questions of 200. Stock vLLM has the document in its prefix cache, and so has vllm-l2kv
where it compresses nothing.
"""

import math
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.answers import Client
from benchmarks.speed.engines import is_measured, random_tokens, scheduler_of, step_until_all_decode

NUM_DOCUMENT_TOKENS, NUM_QUESTION_TOKENS, NUM_ANSWER_TOKENS = 30_000, 200, 256
RATIOS = (None, 0.25)
REPEATS = 5
"""Number of documents; one more is a warm-up."""
ASKERS = (1, 8, 32)


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """Yields for each ratio a row of times and a row for each number of askers."""
    for number, ratio in enumerate(RATIOS):
        if is_measured(about, ratio, None, only):
            asked = asked_of(NUM_DOCUMENT_TOKENS, ratio)
            what = {"keep_ratio": ratio or 1.0, "num_document_tokens": NUM_DOCUMENT_TOKENS}
            yield {**what, "num_question_tokens": NUM_QUESTION_TOKENS, **time_questions(llm, number, asked)}
            document = random_tokens([1, number], NUM_DOCUMENT_TOKENS)
            Client(llm, f"warm-{number}").ask(document + question(1, number), 1, **asked)
            for num_askers in ASKERS:
                yield {**what, **hold(llm, about, document, num_askers, asked)}


def asked_of(num_document_tokens: int, ratio: float | None, budget: int | None = None) -> dict[str, Any]:
    """Returns the arguments of `vllm_l2kv.compression` for a document; none for one that is kept whole."""
    if ratio is None:
        return {}
    return {"keep_ratio": ratio, "max_tokens": budget, "prefix_tokens": num_document_tokens}


def question(*seed: int) -> list[int]:
    """Returns the tokens of a question."""
    return random_tokens([2, *seed], NUM_QUESTION_TOKENS)


def time_questions(llm: Any, number: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Asks about each document twice, one question after another, on an otherwise idle engine."""
    client = Client(llm, f"document-{number}")
    firsts, seconds = [], []
    for i in range(REPEATS + 1):
        document = random_tokens([3, number, i], NUM_DOCUMENT_TOKENS)
        for answers, seed in ((firsts, 0), (seconds, 1)):
            answers.append(client.ask(document + question(3, number, i, seed), 1, **asked))
    return {
        "first_question_ms": [round(answer.first_token_ms, 2) for answer in firsts[1:]],
        "second_question_ms": [round(answer.first_token_ms, 2) for answer in seconds[1:]],
        "median_second_question_ms": round(statistics.median(answer.first_token_ms for answer in seconds[1:]), 2),
        "cached_tokens": min(answer.cached_tokens for answer in seconds),
    }


def hold(
    llm: Any, about: dict[str, Any], document: list[int], num_askers: int, asked: dict[str, Any]
) -> dict[str, Any]:
    """Returns the memory of askers that decode together, and their memory without any padding."""
    client = Client(llm, f"askers-{num_askers}")
    for i in range(num_askers):
        client.add(document + question(4, num_askers, i), NUM_ANSWER_TOKENS, **asked)
    step_until_all_decode(llm, num_askers)
    scheduler = scheduler_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    num_held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is the null block
    num_own = sum(request.num_computed_tokens - len(document) for request in scheduler.running)
    client.abort()
    return {
        "num_askers": num_askers,
        "held_bytes": num_held * about["block_bytes"],
        "needed_bytes": needed_bytes(llm, about, len(document), asked.get("keep_ratio", 1.0), num_own),
    }


def needed_bytes(llm: Any, about: dict[str, Any], num_document_tokens: int, ratio: float, num_own: int) -> int:
    """Returns the bytes of one copy of a document and of the askers' own tokens."""
    *full, (num_compressed, _) = sorted(about["groups"], key=lambda group: -group[1])
    num_full = sum(num_layers for num_layers, _ in full)
    copy = num_full * num_document_tokens + num_compressed * math.ceil(ratio * num_document_tokens)
    return (copy + (num_full + num_compressed) * num_own) * token_bytes(llm)


def token_bytes(llm: Any) -> int:
    """Returns the bytes of a token's keys and values in one layer, on one GPU."""
    config = llm.llm_engine.vllm_config
    num_heads = config.model_config.get_num_kv_heads(config.parallel_config)
    return 2 * num_heads * config.model_config.get_head_size() * config.model_config.dtype.itemsize
