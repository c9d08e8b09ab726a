"""Documents that are compressed once and found by later questions, and conversations that continue from a compaction of
an earlier turn. Answers equal those of the reference to each request alone, with rows found or computed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import pytest
import torch
from cached_rows import CachedRows
from engine import Engine, bare_rule, draw, greedy, keep, running, tokens_of
from reference import expected_compactions, expected_numbers
from scored import TELLING_SCORERS, ScoredReference
from usages import numbers_of

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.messages.usage import KeptWhole
from vllm_l2kv.scheduler.integrity import check_requests

INTERVALS = (256, 32)
NUM_BATCHED = 256
BLOCK = 32
"""Tokens of a block of compressed layers. Prefix-cache hits end at multiples of it."""
DOCUMENT, RULE = 397, {"ratio": "0.4", "document": 397}
"""Leaves 159 rows. Neither number is a multiple of a block, so every question writes into a copy of the last one."""


@dataclass
class Documents:
    """An engine of the tiny model, and the reference's answers.

    Attributes:
        scorer: For rules without one. In layer 0 the keys of a token differ only in direction, so norms would tie if it
            is compressed.
    """

    engine: Engine
    reference: ScoredReference
    full_layers: tuple[int, ...]
    scorer: str
    _answers: dict[Any, list[int] | None] = field(default_factory=dict, repr=False)

    def answer(self, prompt: Sequence[int], num_tokens: int = 12, **rule: Any) -> list[int] | None:
        """Returns the reference's answer; `None` if rounding decides it."""
        rule = {"scorer": self.scorer, "intervals": INTERVALS, **rule}
        asked = (tuple(prompt), num_tokens, *sorted(rule.items()))
        if asked not in self._answers:
            self._answers[asked] = self.reference.telling_answer(prompt, num_tokens, **rule)
        return self._answers[asked]

    def after(self, begin: Sequence[int], seed: int, length: int = 33, num_tokens: int = 12, **rule: Any) -> list[int]:
        """Returns a prompt that continues with its own tokens, such that rounding does not decide its answer."""
        chance = random.Random(seed)
        for _ in range(20):
            prompt = [*begin, *draw(chance, length)]
            if self.answer(prompt, num_tokens, **rule) is not None:
                return prompt
        raise AssertionError("rounding decides all of them, so probably the document's rows")

    def asks(self, num_tokens: int = 12, **rule: Any):
        """Returns the parameters of a request."""
        return keep(**{"scorer": self.scorer, "ratio": "1", **rule}, num_tokens=num_tokens)

    def check(self, output, found: int, cached: int | None = None, **rule: Any) -> None:
        """Checks answer and numbers of a request that found so many tokens."""
        prompt, num_tokens = output.prompt_token_ids, len(output.outputs[0].token_ids)
        assert tokens_of(output) == self.answer(prompt, num_tokens, **rule)
        assert output.num_cached_tokens == (found if cached is None else cached)
        numbers = {key: value for key, value in numbers_of(output).items() if key != "reason"}
        rule = {name: value for name, value in rule.items() if name != "scorer"}
        assert numbers == expected_numbers(len(prompt), num_tokens, found=found, intervals=INTERVALS, **rule)

    def ask(self, prompt: Sequence[int], found: int, cached: int | None = None, num_tokens: int = 12, **rule: Any):
        """Runs one request alone and checks it."""
        (output,) = self.engine.generate([prompt], [self.asks(num_tokens, **rule)])
        self.check(output, found, cached, **rule)
        return output


@pytest.fixture(scope="module", params=[(0,), pytest.param((), marks=pytest.mark.slow)], ids=str)
def module_documents(request, llama):
    full_layers = request.param
    rule = bare_rule(full_layers=full_layers, prompt_interval=INTERVALS[0], answer_interval=INTERVALS[1])
    small = {"max_model_len": 4096, "num_gpu_blocks_override": 401, "max_num_batched_tokens": NUM_BATCHED}
    with running(llama, **rule, **small, max_num_seqs=64) as engine:
        scorer = "l2" if full_layers else "keydiff"
        yield Documents(engine, ScoredReference(llama, len(full_layers)), full_layers, scorer)


@pytest.fixture
def documents(module_documents):
    with module_documents.engine.emptied():
        yield module_documents


def ordinary_hit(first_compaction: int) -> int:
    """Returns the tokens before its first compaction that a request finds in the ordinary prefix cache."""
    return (first_compaction - 1) // BLOCK * BLOCK


# --- one document, several questions


LENGTHS_AND_RULES = [
    (DOCUMENT, {"ratio": "0.4"}),
    (20, {"ratio": "0.5"}),  # shorter than a block
    (900, {"ratio": "0.25"}),  # longer than what a step computes
    (320, {"ratio": "0.9", "first": 4, "last": 16}),
    (101, {"ratio": "0.1", "first": 8, "last": 40}),  # keeps only the protected rows
    (64, {"ratio": "0.5"}),  # whole blocks before and after
]


def test_every_question_answers_as_on_freshly_compressed_rows(documents):
    """The first question compresses the document, the others find it; then all again in one batch."""
    asked = []
    for seed, (length, rule) in enumerate(LENGTHS_AND_RULES):
        rule = {**rule, "document": length}
        document = draw(random.Random(seed), length)
        for number, num_tokens in enumerate((33, 1, 200)):
            prompt = documents.after(document, number, num_tokens, **rule)
            documents.ask(prompt, length if number else 0, **rule)
            asked.append((prompt, rule))
    outputs = documents.engine.generate([prompt for prompt, _ in asked], [documents.asks(**rule) for _, rule in asked])
    for (_, rule), output in zip(asked, outputs, strict=True):
        documents.check(output, rule["document"], **rule)
    assert any(
        tokens_of(output) != documents.answer(prompt) for (prompt, _), output in zip(asked, outputs, strict=True)
    )


def test_a_document_that_is_kept_whole_is_an_ordinary_prefix(documents):
    """Nothing is evicted, so a request finds only the ordinary prefix."""
    document = draw(random.Random(7), 200)
    rule = {"ratio": "0.5", "last": 200, "document": 200}
    output = documents.ask(documents.after(document, 0, **rule), 0, **rule)
    assert numbers_of(output)["reason"] == KeptWhole.PROTECTED
    prompt = documents.after(document, 1)
    (output,) = documents.engine.generate([prompt], [documents.asks(document=200)])
    assert output.num_cached_tokens == 192
    assert numbers_of(output)["reason"] == KeptWhole.WHOLE_DOCUMENT
    assert tokens_of(output) == documents.answer(prompt)


def test_a_warm_up_of_one_token(documents):
    document = draw(random.Random(8), DOCUMENT)
    documents.ask(documents.after(document, 0, 1, num_tokens=1, **RULE), 0, num_tokens=1, **RULE)
    documents.ask(documents.after(document, 1, **RULE), DOCUMENT, **RULE)


def test_nothing_is_found_after_a_reset(documents):
    document = draw(random.Random(9), DOCUMENT)
    prompt = documents.after(document, 0, **RULE)
    documents.ask(prompt, 0, **RULE)
    documents.ask(prompt, DOCUMENT, **RULE)
    assert documents.engine.llm.reset_prefix_cache()
    documents.ask(prompt, 0, **RULE)
    documents.ask(prompt, DOCUMENT, **RULE)


def test_what_others_ask_finds_nothing_compressed_but_the_ordinary_prefix(documents):
    """Each of them compresses the document itself, and finds it the next time."""
    document = draw(random.Random(10), DOCUMENT)
    documents.ask(documents.after(document, 0, **RULE), 0, **RULE)
    others = [{"ratio": "0.5"}, {"first": 4}, {"last": 8}, {"document": DOCUMENT - 1}, {"budget": 100}]
    # Without a full layer, the other scorers tie in layer 0.
    scorers = (
        [{"scorer": name} for name in TELLING_SCORERS if name != documents.scorer] if documents.full_layers else []
    )
    for number, other in enumerate([*others, *scorers], 1):
        rule = {**RULE, **other}
        # With the budget, the first compaction is inside the document.
        cached = ordinary_hit(100 + INTERVALS[0] if "budget" in other else rule["document"])
        documents.ask(documents.after(document, number, **rule), 0, cached, **rule)
        documents.ask(documents.after(document, -number, **rule), rule["document"], **rule)
    documents.ask(documents.after(document, 0, **RULE), DOCUMENT, **RULE)
    last = [*document[:-1], *draw(random.Random(0), 1)]
    documents.ask(documents.after(last, 0, **RULE), 0, ordinary_hit(DOCUMENT), **RULE)


def test_parameters_that_lead_to_the_same_rows_share(documents):
    """The name of a document contains exactly what decides its rows."""
    document = draw(random.Random(11), DOCUMENT)
    documents.ask(documents.after(document, 0, **RULE), 0, **RULE)
    for number, other in enumerate([{"ratio": "0.4001"}, {"budget": 3000}], 1):
        rule = {**RULE, **other}
        documents.ask(documents.after(document, number, **rule), DOCUMENT, **rule)


def test_another_salt_finds_nothing(documents):
    document = draw(random.Random(12), DOCUMENT)
    prompt = documents.after(document, 0, **RULE)
    for salt, found in (
        ("mine", 0),
        ("yours", 0),
        (None, 0),
        ("mine", DOCUMENT),
        ("yours", DOCUMENT),
        (None, DOCUMENT),
    ):
        request = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
        (output,) = documents.engine.llm.generate([request], [documents.asks(**RULE)], use_tqdm=False)
        documents.check(output, found, **RULE)


def test_a_request_that_is_kept_whole_never_finds_compressed_rows(documents):
    """The same holds for a request compressed at the end of its prompt, or with a longer document."""
    document = draw(random.Random(13), DOCUMENT)
    for number in range(2):
        documents.ask(documents.after(document, number, **RULE), DOCUMENT * number, **RULE)
    prompt = documents.after(document, 2)
    (output,) = documents.engine.generate([prompt], [greedy(12)])
    assert output.num_cached_tokens == ordinary_hit(DOCUMENT)
    assert tokens_of(output) == documents.answer(prompt)
    for number, other in enumerate(({"ratio": "0.4"}, {"ratio": "0.4", "document": DOCUMENT + 20}), 3):
        documents.ask(documents.after(document, number, **other), 0, ordinary_hit(DOCUMENT), **other)


def test_the_documents_of_the_demo_model(compressing, all_layers, reference, text_ids):
    once = list(dict.fromkeys(text_ids))
    cases = [
        (compressing, (0, 1), text_ids[100:450], {"ratio": "0.5", "document": 350}),
        (compressing, (0, 1), text_ids[130:630], {"ratio": "0.5", "budget": 200, "first": 4, "document": 500}),
        (all_layers, (), once[:450], {"ratio": "0.3", "last": 32, "document": 450}),
    ]
    for engine, full_layers, document, rule in cases:
        for number in range(2):
            prompt = document + once[500 + 30 * number : 530 + 30 * number]
            (output,) = engine.generate([prompt], [keep(**rule, num_tokens=8)])
            assert tokens_of(output) == reference.generate(prompt, 8, full_layers=full_layers, **rule)
            found = rule["document"] * number
            assert output.num_cached_tokens == found
            assert numbers_of(output) == expected_numbers(len(prompt), 8, found=found, **rule)


# --- blocks and rows


def test_questions_at_once_hold_the_same_blocks_and_a_copy_of_the_last(documents):
    engine, document = documents.engine, draw(random.Random(14), DOCUMENT)
    documents.ask(documents.after(document, 0, **RULE), 0, **RULE)
    prompts = [documents.after(document, number, **RULE) for number in (1, 2, 3)]
    ids = [engine.add(str(number), prompt, documents.asks(**RULE)) for number, prompt in enumerate(prompts)]
    while any(engine.scheduler.requests[req_id].num_output_tokens < 2 for req_id in ids):
        engine.step()
    for manager, num_rows in zip(engine.managers, (DOCUMENT, 159)[-len(engine.managers) :], strict=True):
        num_shared = num_rows // manager.block_size
        tables = [manager.req_to_blocks[req_id] for req_id in ids]
        for blocks in zip(*(table[:num_shared] for table in tables), strict=True):
            assert len({block.block_id for block in blocks}) == 1
            assert blocks[0].ref_cnt == 3
        own = [block for table in tables for block in table[num_shared:]]
        assert len({block.block_id for block in own}) == len(own)
        assert {block.ref_cnt for block in own} == {1}
        # Rows of the document and of the question, and two tokens of the answer.
        assert [len(table) for table in tables] == [num_blocks_for(num_rows + 35, manager.block_size)] * 3
    assert all(engine.num_evicted(req_id) == engine.worker.num_evicted()[req_id] == DOCUMENT - 159 for req_id in ids)
    for output in engine.drain().values():
        documents.check(output, DOCUMENT, **RULE)


def test_questions_that_come_together_wait_for_one_copy(documents):
    """Other requests do not wait: the last one begins while the document is being computed."""
    engine, document = documents.engine, draw(random.Random(15), DOCUMENT)
    prompts = [documents.after(document, number, **RULE) for number in (1, 2, 3)]
    ids = [engine.add(str(number), prompt, documents.asks(**RULE)) for number, prompt in enumerate(prompts)]
    stranger = documents.after((), 4)
    passes = engine.add("stranger", stranger, greedy(12))
    for running_ids in ([ids[0]], [ids[0], passes]):
        engine.step()
        assert [request.request_id for request in engine.scheduler.running] == running_ids
    outputs = engine.drain()
    assert tokens_of(outputs["stranger"]) == documents.answer(stranger)
    for number in range(3):
        documents.check(outputs[str(number)], DOCUMENT if number else 0, **RULE)


def test_a_waiting_request_computes_the_document_if_its_creator_is_gone(documents):
    engine, document = documents.engine, draw(random.Random(16), DOCUMENT)
    prompts = [documents.after(document, number, **RULE) for number in (1, 2)]
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, documents.asks(**RULE))
    engine.step()
    assert len(engine.scheduler.running) == 1
    engine.llm.llm_engine.abort_request(["0"])
    (output,) = [output for name, output in engine.drain().items() if name == "1"]
    # The first request's tokens are an ordinary prefix; inside a block of full layers, from the next step on.
    documents.check(output, 0, 192 if documents.full_layers else NUM_BATCHED, **RULE)


def test_found_rows_are_those_of_the_first_and_of_a_fresh_engine(documents):
    """Rows are equal in every bit, since the chunks and so the order of sums are the same."""
    engine, document = documents.engine, draw(random.Random(17), DOCUMENT)
    prompts, num_evicted = [documents.after(document, number, **RULE) for number in (1, 2)], DOCUMENT - 159

    def rows_after_the_first_token(prompt: list[int]) -> dict[int, torch.Tensor]:
        req_id = engine.add("r", prompt, documents.asks(**RULE))
        while engine.scheduler.requests[req_id].num_output_tokens < 1:
            engine.step()
        assert engine.num_evicted(req_id) == num_evicted
        rows = CachedRows(engine).of(req_id, DOCUMENT, num_evicted)
        assert [rows[layer].shape[1] for layer in range(4)] == [
            DOCUMENT if layer in documents.full_layers else 159 for layer in range(4)
        ]
        engine.drain()
        return rows

    first, found = map(rows_after_the_first_token, prompts)
    assert engine.kv_cache_manager.reset_prefix_cache()
    fresh = rows_after_the_first_token(prompts[1])
    for layer, rows in fresh.items():
        assert torch.equal(rows, first[layer])
        assert torch.equal(rows, found[layer])


def test_an_evicted_document_is_compressed_again(documents):
    """Other requests need the whole pool and evict it like any prefix."""
    engine, document = documents.engine, draw(random.Random(18), DOCUMENT)
    documents.ask(documents.after(document, 1, **RULE), 0, **RULE)
    with engine.filled_up(0):
        pass
    documents.ask(documents.after(document, 2, **RULE), 0, **RULE)
    documents.ask(documents.after(document, 3, **RULE), DOCUMENT, **RULE)


def test_a_document_that_two_rules_compress_in_a_pool_that_is_used_up(documents):
    """Its full blocks are found and freed again. Other requests reuse each of them once."""
    engine, document = documents.engine, draw(random.Random(29), DOCUMENT)
    with engine.pool_of(36):
        for number, rule in enumerate((RULE, {**RULE, "ratio": "0.5"})):
            engine.add("asks", documents.after(document, number, **rule), documents.asks(**rule))
            documents.check(engine.drain()["asks"], 0, ordinary_hit(DOCUMENT) * number, **rule)
        for seed in range(4):
            engine.add("stranger", draw(random.Random(30 + seed), 600), greedy(2))
            engine.drain()


# --- budgets


def test_a_document_larger_than_the_pool(documents):
    """A budget bounds it while it is computed, and at its end."""
    rule = {"ratio": "0.5", "first": 4, "last": 16, "budget": 128, "document": 1500}
    document = draw(random.Random(19), 1500)
    left = expected_compactions(1600, 1599, **rule, intervals=INTERVALS)
    assert list(left.items())[-1] == (1500, 128)
    assert len(left) > 4
    # Half as many with a full layer, which holds every token.
    num_free = 40 if documents.full_layers else 20
    with documents.engine.pool_of(num_free):
        for number in range(3):
            prompt = documents.after(document, number, 80, num_tokens=20, **rule)
            (output,) = documents.engine.llm.generate(
                [{"prompt_token_ids": prompt}], [documents.asks(20, **rule)], use_tqdm=False
            )
            documents.check(output, 1500 if number else 0, **rule)


CONVERSATION = {"first": 4, "last": 16, "budget": 128}


def last_in_prompt(num_prompt_tokens: int, **rule: Any) -> int:
    """Returns where the next turn of a conversation with such a prompt continues; 0 for the beginning."""
    return max(expected_compactions(num_prompt_tokens, num_prompt_tokens - 1, **rule, intervals=INTERVALS), default=0)


@pytest.mark.parametrize("rule", [CONVERSATION, {**CONVERSATION, "ratio": "0.5", "document": 300}], ids=str)
def test_a_conversation_goes_on_at_the_last_compaction_of_an_earlier_prompt(rule, documents):
    prompt, found, history = draw(random.Random(20), 350), 0, []
    for turn in range(4):
        prompt = documents.after(prompt, turn, 60 + 70 * turn, num_tokens=20, **rule)
        output = documents.ask(prompt, found, num_tokens=20, **rule)
        found = last_in_prompt(len(prompt), **rule)
        history.append(found)
        prompt = [*prompt, *tokens_of(output)]
    assert len(set(history)) >= 3
    # Two continue differently at once, and an uncompressed one finds the ordinary prefix.
    prompts = [documents.after(prompt, seed, **rule) for seed in (6, 7)] + [documents.after(prompt, 8)]
    outputs = documents.engine.generate(prompts, [*[documents.asks(**rule)] * 2, greedy(12)])
    for output in outputs[:2]:
        documents.check(output, found, **rule)
    assert tokens_of(outputs[2]) == documents.answer(prompts[2])
    assert outputs[2].num_cached_tokens <= min(expected_compactions(800, 799, **rule, intervals=INTERVALS))


def test_a_conversation_without_a_document_reports_what_it_found(documents):
    prompt = documents.after((), 21, 500, **CONVERSATION)
    assert "found_tokens" not in numbers_of(documents.ask(prompt, 0, **CONVERSATION))
    assert numbers_of(documents.ask(prompt, 384, **CONVERSATION))["found_tokens"] == 384


# --- preemptions


def preempt(engine: Engine, req_id: str) -> None:
    """Preempts as vLLM does when blocks are short."""
    request = engine.scheduler.requests[req_id]
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, monotonic())


@pytest.mark.parametrize("is_reset", [False, True], ids=["the document is found again", "the cache is reset"])
def test_preempted_questions_answer_the_same(is_reset, documents):
    """Preempted at the beginning, in the answer, and all at once."""
    engine, document = documents.engine, draw(random.Random(22), DOCUMENT)
    prompts = [documents.after(document, number, num_tokens=40, **RULE) for number in (1, 2, 3)]
    for num_generated in (0, 1, 20):
        assert engine.kv_cache_manager.reset_prefix_cache()
        documents.ask(documents.after(document, 0, **RULE), 0, **RULE)
        ids = [engine.add(str(number), prompt, documents.asks(40, **RULE)) for number, prompt in enumerate(prompts)]
        engine.step()
        while engine.scheduler.requests[ids[-1]].num_output_tokens < num_generated:
            engine.step()
        if is_reset:
            assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        else:
            for req_id in ids[:0:-1]:
                preempt(engine, req_id)
        check_requests(engine.scheduler)
        for output in engine.drain().values():
            assert tokens_of(output) == documents.answer(output.prompt_token_ids, 40, **RULE)
            assert numbers_of(output)["evicted_tokens"] == DOCUMENT - 159


def test_a_creator_that_is_preempted_before_its_document_is_published(documents):
    """Preempted when its compaction is due, and in the step after it."""
    engine = documents.engine
    for num_steps in (1, 2, 3, 4):
        document = draw(random.Random(23 + num_steps), DOCUMENT)
        prompts = [documents.after(document, number, **RULE) for number in (1, 2)]
        ids = [engine.add(str(number), prompt, documents.asks(**RULE)) for number, prompt in enumerate(prompts)]
        for _ in range(num_steps):
            engine.step()
        preempt(engine, ids[0])
        outputs = engine.drain()
        for number, prompt in enumerate(prompts):
            assert tokens_of(outputs[str(number)]) == documents.answer(prompt, **RULE)
        documents.ask(prompts[0], DOCUMENT, **RULE)


def test_questions_in_a_tight_pool(documents):
    """Each answer grows by blocks that the pool does not have for all of them."""
    engine, document, num_tokens = documents.engine, draw(random.Random(28), DOCUMENT), 90
    prompts = [documents.after(document, number, num_tokens=num_tokens, **RULE) for number in range(6)]
    num_preempted = 0
    with engine.pool_of(32 if documents.full_layers else 24):
        requests = [
            engine.scheduler.requests[engine.add(str(number), prompt, documents.asks(num_tokens, **RULE))]
            for number, prompt in enumerate(prompts)
        ]
        outputs = engine.drain()
        num_preempted = sum(request.num_preemptions for request in requests)
    assert num_preempted
    for number, prompt in enumerate(prompts):
        assert tokens_of(outputs[str(number)]) == documents.answer(prompt, num_tokens, **RULE)
        numbers = expected_numbers(len(prompt), num_tokens, **RULE)
        assert {**numbers_of(outputs[str(number)]), "found_tokens": 0} == numbers


# --- crowds


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_crowd_with_documents_conversations_and_strangers(documents, seed):
    """In a pool for a few requests, with random preemptions."""
    engine, chance = documents.engine, random.Random(seed)
    begins = [draw(chance, 600) for _ in range(2)]
    rules = [
        {"ratio": "0.4", "document": 97},
        {"ratio": "0.25", "document": 320, "last": 8},
        {"ratio": "0.5", "document": 200, "budget": 64},
        CONVERSATION,
        {"ratio": "0.5"},
        {"ratio": "1"},
    ]
    asked = []
    for number in range(60):
        rule, num_tokens = chance.choice(rules), chance.randint(2, 60)
        begin = chance.choice(begins)[: chance.choice((330, 450, 600))]
        asked.append(
            (documents.after(begin, 100 * seed + number, chance.randint(1, 60), num_tokens, **rule), num_tokens, rule)
        )
    num_found = num_preempted = 0
    outputs: dict[str, Any] = {}
    with engine.pool_of(100):
        for number, (_, num_tokens, rule) in enumerate(asked):
            engine.add(str(number), asked[number][0], documents.asks(num_tokens, **rule))
        while engine.llm.llm_engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step()}
            check_requests(engine.scheduler)
            if engine.scheduler.running and chance.random() < 0.02:
                preempt(engine, chance.choice(engine.scheduler.running).request_id)
                num_preempted += 1
    for number, (prompt, num_tokens, rule) in enumerate(asked):
        output = outputs[str(number)]
        assert tokens_of(output) == documents.answer(prompt, num_tokens, **rule), rule
        found = numbers_of(output).get("found_tokens", 0)
        points = expected_compactions(len(prompt), len(prompt) - 1, **rule, intervals=INTERVALS)
        assert found in {0, *points}
        numbers = {key: value for key, value in numbers_of(output).items() if key != "reason"}
        assert numbers == expected_numbers(len(prompt), num_tokens, found=found, intervals=INTERVALS, **rule)
        num_found += found > 0
    assert num_found > 5
    assert num_preempted > 3
