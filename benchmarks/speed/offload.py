"""A second question about a document that is found in CPU memory, found on the GPU, or computed again.

Needs vLLM's connector for CPU memory, with more CPU memory than GPU cache, which should be small:

    --engine-args '{"max_model_len": 49152, "kv_cache_memory_bytes": 8589934592, "kv_transfer_config": {"kv_connector":
    "SimpleCPUOffloadConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"lazy_offload": true,
    "cpu_bytes_to_use": 12884901888}}}'

Stock vLLM has the whole document in CPU memory, and so has vllm-l2kv where it compresses nothing.
"""

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.answers import Answer, Client
from benchmarks.speed.document import NUM_DOCUMENT_TOKENS, RATIOS, REPEATS, asked_of, question
from benchmarks.speed.engines import is_measured, random_tokens, scheduler_of

NUM_BLOCKS_A_STEP = 128
"""Blocks taken in each step; the connector stores the blocks that come next."""
NUM_STRANGER_TOKENS = 30_000


def rows(llm: Any, about: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each ratio."""
    for number, ratio in enumerate(RATIOS):
        if is_measured(about, ratio, None, only):
            times = time_questions(llm, number, asked_of(NUM_DOCUMENT_TOKENS, ratio))
            yield {"keep_ratio": ratio or 1.0, "num_document_tokens": NUM_DOCUMENT_TOKENS, **times}


def time_questions(llm: Any, number: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Asks about each document three times on an idle engine; before the last one, the GPU's cache is used up."""
    client = Client(llm, f"offload-{number}")
    answers: dict[str, list[Answer]] = {"computed": [], "found_on_gpu": [], "found_in_cpu_memory": []}
    for i in range(REPEATS + 1):
        document = random_tokens([5, number, i], NUM_DOCUMENT_TOKENS)
        for seed, (where, found) in enumerate(answers.items()):
            if where == "found_in_cpu_memory":
                reuse_cache(llm, client, number, i)
            found.append(client.ask(document + question(5, number, i, seed), 1, **asked))
    row: dict[str, Any] = {}
    for where, found in answers.items():
        times = [round(answer.first_token_ms, 2) for answer in found[1:]]  # the first document is a warm-up
        cached = min(answer.cached_tokens for answer in found)
        row |= {f"{where}_ms": times, f"median_{where}_ms": statistics.median(times), f"{where}_tokens": cached}
    return row


def reuse_cache(llm: Any, client: Client, *seed: int) -> None:
    """Takes every block of the GPU's cache once, a few in each step of another request, then frees all."""
    pool, connector = scheduler_of(llm).kv_cache_manager.block_pool, scheduler_of(llm).connector
    client.add(random_tokens([6, *seed], 64), NUM_STRANGER_TOKENS)
    client.step()
    held: list[Any] = []
    while (num_free := pool.get_num_free_blocks()) > NUM_BLOCKS_A_STEP:
        held += pool.get_new_blocks(min(NUM_BLOCKS_A_STEP, num_free - NUM_BLOCKS_A_STEP))
        client.step()
        while connector.has_pending_push_work() and pool.get_num_free_blocks() < 2 * NUM_BLOCKS_A_STEP:
            client.step()
    client.abort()
    pool.free_blocks(held)
    pool.free_blocks(pool.get_new_blocks(pool.get_num_free_blocks()))
