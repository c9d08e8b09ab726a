"""Conversations of 30 turns, 16 at once, in a cache that holds 60,000 tokens: time to first token by turn.

A turn adds 900 tokens of the user and 100 of the answer to the history, which every request repeats. The next turn
begins when an answer ends. Stock vLLM recomputes histories that its cache has lost, so it is stopped after a while.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.answers import Answer, Client
from benchmarks.speed.engines import cache_of, is_measured, random_tokens
from vllm_l2kv.settings import Settings

CACHE_BYTES = 60_000 * 128 * 1024
"""60,000 tokens of the 8B shape."""
NUM_CONVERSATIONS, NUM_TURNS, NUM_USER_TOKENS, NUM_ANSWER_TOKENS = 16, 30, 900, 100
BUDGETS = (None, 1024, 2048)
"""Each conversation holds its budget and up to a prompt interval more. With 2,048 of each they do not all fit."""
MOST_SECONDS = 120.0


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each budget."""
    for budget in BUDGETS:
        if not is_measured(about, budget, str(budget), only) or (budget is None and about["engine"] == "l2kv"):
            continue
        with cache_of(llm, CACHE_BYTES // about["num_gpus"], about["block_bytes"]):
            begin = time.perf_counter()
            turns = converse(llm, budget)
            seconds = time.perf_counter() - begin
        yield {
            "cache_bytes": CACHE_BYTES,
            "budget": budget,
            "prompt_interval": Settings.from_config(llm.llm_engine.vllm_config.additional_config).prompt_interval,
            "num_conversations": NUM_CONVERSATIONS,
            "turn_tokens": NUM_USER_TOKENS + NUM_ANSWER_TOKENS,
            "median_first_token_ms": [round(statistics.median(a.first_token_ms for a in turn), 1) for turn in turns],
            "median_cached_tokens": [statistics.median(a.cached_tokens for a in turn) for turn in turns],
            "seconds": round(seconds, 1),
        }


def converse(llm: Any, budget: int | None) -> list[list[Answer]]:
    """Returns the answers of each turn that all conversations reached."""
    client = Client(llm, "conversation")
    histories: dict[Answer, tuple[int, list[int]]] = {}
    turns: list[list[Answer]] = [[] for _ in range(NUM_TURNS)]

    def take_turn(conversation: int, history: list[int], turn: int) -> None:
        prompt = history + random_tokens([10, conversation, turn], NUM_USER_TOKENS)
        answer = client.add(prompt, NUM_ANSWER_TOKENS, max_tokens=budget)
        turns[turn].append(answer)
        histories[answer] = conversation, prompt

    for conversation in range(NUM_CONVERSATIONS):
        take_turn(conversation, [], 0)
    begin = time.perf_counter()
    while client.unfinished and time.perf_counter() - begin < MOST_SECONDS:
        for answer in client.step():
            conversation, prompt = histories.pop(answer)
            turn = len(prompt) // (NUM_USER_TOKENS + NUM_ANSWER_TOKENS) + 1
            if turn < NUM_TURNS:
                take_turn(conversation, prompt + answer.token_ids, turn)
    client.abort()
    return [turn for turn in turns if sum(answer.first_token_at is not None for answer in turn) == NUM_CONVERSATIONS]
