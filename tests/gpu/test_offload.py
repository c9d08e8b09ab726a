"""Documents and prompts in CPU memory, by vLLM's connector with its own copies: bf16, CUDA graphs, async scheduling."""

import random
import time

import pytest
from agreement import rms
from engine import bare_rule, draw, keep, tokens_of
from host_copies import cpu_memory
from vllm.distributed.kv_transfer import get_kv_transfer_group

pytestmark = pytest.mark.gpu

DOCUMENT, NUM_DOCUMENTS = 1500, 24
RULE = {"ratio": "0.25", "document": DOCUMENT}


@pytest.fixture(scope="module")
def engine(start_small, demo_model):
    """An engine whose cache holds four whole documents, or half of all of them compressed."""
    sizes = {"kv_cache_memory_bytes": 160 << 20, "max_num_batched_tokens": 2048, "max_num_seqs": 16}
    rule = bare_rule(full_layers=(0, 1))
    engine = start_small(demo_model, kv_transfer_config=cpu_memory(2 << 30), **sizes, **rule)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def documents():
    return [draw(random.Random(seed), DOCUMENT) for seed in range(NUM_DOCUMENTS)]


def ask(engine, prompts, rule, num_tokens=8):
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    begin = time.perf_counter()
    params = keep(**rule, num_tokens=num_tokens, logprobs=20)
    outputs = engine.llm.generate(requests, [params] * len(prompts), use_tqdm=False)
    return outputs, time.perf_counter() - begin


def settle(engine) -> None:
    """Waits until no copy is in progress."""
    for _ in range(10_000):
        if not engine.scheduler.connector.has_pending_push_work():
            break
        engine.llm.llm_engine.step()
    engine.check_whole()


def empty_gpu(engine) -> None:
    settle(engine)
    engine.pool.free_blocks(engine.pool.get_new_blocks(engine.pool.get_num_free_blocks()))


def likely(output) -> dict[int, float]:
    return {token: value.logprob for token, value in output.outputs[0].logprobs[0].items()}


def test_a_document_answers_the_same_from_cpu_memory_and_from_the_gpu(engine, documents):
    """Equal in every bit: the rows are the same, and single questions are computed in the same way."""
    for document in documents[:4]:
        question = [*document, *draw(random.Random(99), 30)]
        _, computed = ask(engine, [question], RULE)
        (second,), on_gpu = ask(engine, [question], RULE)
        empty_gpu(engine)
        (third,), in_memory = ask(engine, [question], RULE)
        assert (second.num_cached_tokens, third.num_cached_tokens) == (DOCUMENT, DOCUMENT)
        assert tokens_of(third) == tokens_of(second)
        assert likely(third) == likely(second)
        print(f"{DOCUMENT} tokens: computed {computed:.4f} s, GPU {on_gpu:.4f} s, CPU memory {in_memory:.4f} s")


def test_a_whole_prompt_comes_back_and_is_compacted(engine, documents):
    prompt, rule = [*documents[5], *draw(random.Random(98), 200)], {"ratio": "0.5"}
    (first,), _ = ask(engine, [prompt], rule)
    for document in documents[6:14]:  # fill the cache; blocks about to be reused are stored
        ask(engine, [document], {"ratio": "1.0"}, num_tokens=2)
    settle(engine)
    (again,), _ = ask(engine, [prompt], rule)
    assert again.num_cached_tokens >= DOCUMENT - engine.scheduler.block_size
    before, after = likely(first), likely(again)
    assert len(before.keys() & after.keys()) >= 15, "of 20"
    assert rms([before[token] - after[token] for token in before.keys() & after.keys()]) < 0.3


def test_many_at_once_in_a_cache_that_holds_few(engine, documents):
    """Stores, loads, preemptions and compactions in the same steps. A load that overwrites rows of a compaction in
    flight, or a block that is reused while it is stored, would give the answer to another document.
    """
    chance = random.Random(0)
    asked = [(number, [*document, *draw(random.Random(97), 30)]) for number, document in enumerate(documents)]
    alone = {number: likely(ask(engine, [prompt], RULE)[0][0]) for number, prompt in asked}
    off, apart = [], []
    for _ in range(6):
        chance.shuffle(asked)
        outputs, _ = ask(engine, [prompt for _, prompt in asked], RULE)
        for (number, _), output in zip(asked, outputs, strict=True):
            found, right, other = likely(output), alone[number], alone[(number + 1) % NUM_DOCUMENTS]
            off += [found[token] - right[token] for token in found.keys() & right.keys()]
            apart += [value - right.get(token, min(right.values())) for token, value in other.items()]
            assert len(found.keys() & right.keys()) >= 12, "of 20"
    backend = get_kv_transfer_group().worker_handler
    print(f"answers differ by {rms(off):.4f}, other documents' by {rms(apart):.4f}; loads {backend._load_hwm + 1}")
    assert backend._load_hwm > 6
    assert rms(off) < rms(apart) / 4
    settle(engine)
    engine.step()
    assert engine.worker.num_evicted() == {}
