"""Documents and prompts loaded from CPU memory by vLLM's connector: its scheduler, worker and layout are real, the
copies are plain ones. Answers equal those of the reference to each request alone.
"""

import random

import pytest
from engine import bare_rule, draw, running
from host_copies import cpu_memory, open_connector
from scored import ScoredReference
from test_documents import DOCUMENT, INTERVALS, LENGTHS_AND_RULES, NUM_BATCHED, RULE, Documents
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown, get_kv_transfer_group

from vllm_l2kv.block_math import num_blocks_for

NUM_BLOCKS = 401


@pytest.fixture(scope="module", params=[(0,), pytest.param((), marks=pytest.mark.slow)], ids=str)
def documents(request, llama):
    with pytest.MonkeyPatch.context() as monkeypatch:
        open_connector(monkeypatch)
        rule = bare_rule(full_layers=request.param, prompt_interval=INTERVALS[0], answer_interval=INTERVALS[1])
        small = {"max_model_len": 4096, "num_gpu_blocks_override": NUM_BLOCKS, "max_num_batched_tokens": NUM_BATCHED}
        with running(llama, **rule, **small, max_num_seqs=64, kv_transfer_config=cpu_memory(1 << 28)) as engine:
            scorer = "l2" if request.param else "keydiff"
            yield Documents(engine, ScoredReference(llama, len(request.param)), request.param, scorer)
        ensure_kv_transfer_shutdown()  # otherwise the next engine of this process would have this connector too


def copies():
    return get_kv_transfer_group().worker_handler._backend


def empty_gpu(documents) -> None:
    """Clears the GPU's cache as if all of it had been reused; published documents are in CPU memory."""
    documents.engine.check_whole()
    pool = documents.engine.pool
    pool.free_blocks(pool.get_new_blocks(pool.get_num_free_blocks()))


def test_documents_are_loaded_from_cpu_memory(documents):
    """All of them are stored before the first is loaded; the second question finds them in CPU memory, the third on
    the GPU.
    """
    asked = []
    for seed, (length, rule) in enumerate(LENGTHS_AND_RULES):
        rule = {**rule, "document": length}
        document = draw(random.Random(seed), length)
        asked.append((document, rule))
        documents.ask(documents.after(document, seed, **rule), 0, 0, **rule)
    empty_gpu(documents)
    for seed, (document, rule) in enumerate(asked):
        num_loaded = copies().num_loaded
        for number, found_on_gpu in ((100, False), (200, True)):
            question = documents.after(document, seed + number, **rule)
            documents.ask(question, len(document), **rule)
            assert (copies().num_loaded == num_loaded) == found_on_gpu
            num_loaded = copies().num_loaded


def test_questions_at_once_share_one_load(documents):
    document = draw(random.Random(7), DOCUMENT)
    documents.ask(documents.after(document, 1, **RULE), 0, 0, **RULE)
    empty_gpu(documents)
    num_loaded = copies().num_loaded
    questions = [documents.after(document, seed, **RULE) for seed in range(2, 6)]
    outputs = documents.engine.generate(questions, [documents.asks(**RULE)] * 4)
    for output in outputs:
        documents.check(output, DOCUMENT, **RULE)
    sizes = [manager.block_size for manager in documents.engine.managers]
    compressed = documents.engine.worker._compressed_group_ids
    rows = [159 if group in compressed else DOCUMENT for group in range(len(sizes))]
    assert copies().num_loaded - num_loaded == sum(map(num_blocks_for, rows, sizes))


def test_a_conversation_is_loaded_at_its_last_compaction(documents):
    rule = {"ratio": "1", "budget": 128}
    begin = draw(random.Random(17), 700)
    first = documents.ask(documents.after(begin, 18, **rule), 0, 0, **rule)
    empty_gpu(documents)
    turn = [*first.prompt_token_ids, *first.outputs[0].token_ids]
    position = 128 + INTERVALS[0]
    last = position + (len(first.prompt_token_ids) - 1 - position) // INTERVALS[0] * INTERVALS[0]
    documents.ask(documents.after(turn, 19, **rule), last, **rule)


def test_whole_prompts_are_loaded_and_compacted(documents):
    """Stored when their blocks are about to be reused; found up to the last position where blocks of all layers end."""
    rule = {"ratio": "0.5"}
    prompt = documents.after(draw(random.Random(27), 1200), 28, **rule)
    documents.ask(prompt, 0, 0, **rule)
    copies().lag = 1  # as on a GPU, where a copy outlasts its step; vLLM's walk through free blocks relies on it
    for seed in range(16):
        stranger = {"prompt_token_ids": draw(random.Random(300 + seed), 1000)}
        documents.engine.llm.generate(stranger, documents.asks(num_tokens=2), use_tqdm=False)
    copies().lag = 0
    unit = documents.engine.scheduler.block_size
    num_loaded = copies().num_loaded
    documents.ask(prompt, 0, (len(prompt) - 1) // unit * unit, **rule)
    assert copies().num_loaded > num_loaded
