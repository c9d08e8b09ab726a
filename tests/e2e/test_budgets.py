"""Budgets with little memory: prompts larger than the cache, refusals, many requests, preemptions. After each test all
blocks are free. Answers equal those of the reference to each request alone.
"""

import random
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
from engine import Engine, bare_rule, draw, greedy, keep, running, tokens_of
from reference import check_numbers
from scored import ScoredReference
from usages import numbers_of

from vllm_l2kv import ParamError, compression
from vllm_l2kv.params import ONE_COMPACTION_SCORERS
from vllm_l2kv.scheduler.integrity import check_requests

BUDGET, INTERVALS = 128, (128, 32)
MAX_MODEL_LEN = 4096
NUM_BLOCKS = {(): 20, (0,): 56}
"""Usable blocks, by full layers: about as few as the longest request needs."""
TOKENS_OF_A_BLOCK = {(): 32, (0,): 24}
"""Blocks of a request without evictions: with one full layer, 96 tokens need one block more than their three."""


class Bounded(NamedTuple):
    """An engine with a default budget, and a context of several caches."""

    engine: Engine
    reference: ScoredReference
    full_layers: tuple[int, ...]
    scorer: str

    @property
    def pool(self) -> int:
        """Number of uncompressed tokens that the pool holds."""
        return NUM_BLOCKS[self.full_layers] * TOKENS_OF_A_BLOCK[self.full_layers]

    def answer(self, prompt: list[int], num_tokens: int, **rule: Any) -> list[int] | None:
        """Returns the reference's answer by the engine's defaults; `None` if rounding decides it."""
        return self.reference.telling_answer(
            prompt, num_tokens, self.scorer, **{"budget": BUDGET, "intervals": INTERVALS, **rule}
        )

    def prompt(self, chance: random.Random, length: int, num_tokens: int, **rule: Any) -> list[int]:
        """Returns a random prompt such that rounding does not decide its answer, which differs between machines."""
        for _ in range(20):
            prompt = draw(chance, length)
            if self.answer(prompt, num_tokens, **rule) is not None:
                return prompt
        raise AssertionError("rounding decides all of them")


@pytest.fixture(scope="module", params=[(), pytest.param((0,), marks=pytest.mark.slow)], ids=str)
def module_bounded(request, llama):
    full_layers = request.param
    # In layer 0 the keys of a token differ only in direction, so norms would tie.
    scorer = "l2" if full_layers else "keydiff"
    rule = bare_rule(
        full_layers=full_layers,
        prompt_interval=INTERVALS[0],
        answer_interval=INTERVALS[1],
        default_max_tokens=BUDGET,
        scorer=scorer,
    )
    small = {"max_model_len": MAX_MODEL_LEN, "num_gpu_blocks_override": NUM_BLOCKS[full_layers] + 1}
    with running(llama, **rule, **small, max_num_seqs=64, max_num_batched_tokens=256) as engine:
        reference = ScoredReference(llama, len(full_layers))
        yield Bounded(engine, reference, full_layers, scorer)


@pytest.fixture
def bounded(module_bounded):
    with module_bounded.engine.emptied():
        yield module_bounded


def test_prompts_of_several_pools(bounded):
    """Three pools, and six where no full layer holds every token."""
    for num_pools in (3,) if bounded.full_layers else (3, 6):
        prompt = bounded.prompt(random.Random(num_pools), num_pools * bounded.pool, 40)
        (output,) = bounded.engine.generate([prompt], [greedy(40)])
        assert tokens_of(output) == bounded.answer(prompt, 40)
        check_numbers(output, budget=BUDGET, intervals=INTERVALS)


def test_a_request_that_can_never_fit_is_refused_alone_with_the_numbers(bounded):
    chance = random.Random(0)
    prompts = [bounded.prompt(chance, 150, 20), draw(chance, bounded.pool + 100), bounded.prompt(chance, 300, 20)]
    params = [greedy(20), keep(1, budget=10**6, num_tokens=8), greedy(20)]
    before, refused, after = bounded.engine.generate(prompts, params)
    assert refused.outputs[0].finish_reason == "error"
    assert tokens_of(refused) == []
    needed = -(-(bounded.pool + 107) // 32) + (-(-(bounded.pool + 107) // 96) if bounded.full_layers else 0)
    num_blocks = NUM_BLOCKS[bounded.full_layers]
    for numbers in (
        f"A prompt of {bounded.pool + 100} tokens with max_tokens=8 and kv_max_tokens=1000000",
        f"needs {needed} blocks of the KV cache, which has {num_blocks}",
    ):
        assert numbers in refused.outputs[0].stop_reason
    for prompt, output in ((prompts[0], before), (prompts[2], after)):
        assert tokens_of(output) == bounded.answer(prompt, 20)


def test_an_answer_without_a_bound_gets_what_fits(bounded):
    """The request switches the budget off and has no `max_tokens`."""
    chance = random.Random(1)
    long, short = bounded.prompt(chance, bounded.pool - 60, 61, budget=None), bounded.prompt(chance, 90, 50)
    unbounded, named = bounded.engine.generate([long, short], [keep(1, budget=10**6, num_tokens=None), greedy(50)])
    # The last token needs no slot.
    assert tokens_of(unbounded) == bounded.answer(long, 61, budget=None)
    assert unbounded.outputs[0].finish_reason == "length"
    assert numbers_of(unbounded)["max_tokens"] == 61
    assert numbers_of(unbounded)["kept_tokens"] == bounded.pool
    assert tokens_of(named) == bounded.answer(short, 50)
    assert "max_tokens" not in numbers_of(named)


def test_what_is_computed_after_a_compaction_is_never_found(bounded):
    """An uncompressed request with the same beginning finds only rows computed before the first compaction."""
    chance = random.Random(6)
    prompt, short = draw(chance, 300), draw(chance, 64)
    (answer,) = bounded.engine.tokens([prompt], [greedy(20)])
    check_found(bounded, [*prompt, *answer], BUDGET + INTERVALS[0])
    # This request evicts less than a block, so its block for tokens 64 to 95 would hold rows of most of them.
    (answer,) = bounded.engine.tokens([short], [keep("0.8", budget=10**6, num_tokens=90)])
    check_found(bounded, [*short, *answer], 64)


def check_found(bounded, prompt: list[int], num_tokens: int) -> None:
    """Checks that an uncompressed request finds so many tokens, and answers as on a fresh engine."""
    (whole,) = bounded.engine.generate([prompt], [keep(1, budget=10**6, num_tokens=20)])
    assert whole.num_cached_tokens == num_tokens
    assert tokens_of(whole) == bounded.answer(prompt, 20, budget=None)


@pytest.mark.parametrize("scorer", ONE_COMPACTION_SCORERS)
def test_scorers_of_one_compaction_are_refused_by_name(bounded, scorer):
    with pytest.raises(ParamError, match=f"kv_scorer '{scorer}'"):
        compression(max_tokens=BUDGET, protect_last=0, scorer=scorer)
    prompt = bounded.prompt(random.Random(2), 200, 12)
    # Without that check, as an offline user may, with the engine's budget.
    good, bad = bounded.engine.generate([prompt] * 2, [greedy(12), greedy(12, {"kv_scorer": scorer})])
    assert bad.outputs[0].finish_reason == "error"
    assert f"kv_scorer '{scorer}'" in bad.outputs[0].stop_reason
    assert tokens_of(good) == bounded.answer(prompt, 12)


# --- crowds and preemptions


class Asked(NamedTuple):
    """A request with its answer."""

    prompt: list[int]
    num_tokens: int
    rule: dict[str, Any]
    answer: list[int]

    @property
    def params(self) -> Any:
        return keep(self.rule["ratio"], 0, self.rule["last"], self.num_tokens, self.rule["budget"])


def crowd(bounded, chance: random.Random, num_requests: int, begin: list[int] = ()) -> list[Asked]:
    """Returns requests of small budgets and mixed ratios, of which rounding decides no answer of the reference."""
    asked = []
    while len(asked) < num_requests:
        prompt, num_tokens = [*begin, *draw(chance, chance.randint(100, 240))], chance.randint(30, 80)
        rule = {
            "ratio": chance.choice(("1", "1", "0.5")),
            "last": chance.choice((0, 8)),
            "budget": chance.choice((32, 48, 64)),
        }
        answer = bounded.answer(prompt, num_tokens, **rule)
        if answer is not None:
            asked.append(Asked(prompt, num_tokens, rule, answer))
    return asked


def ask_all(engine, asked: list[Asked], interfere=lambda: None) -> set[int]:
    """Runs all at once and checks every answer; returns the indices of preempted requests."""
    numbers = {engine.add(str(number), each.prompt, each.params): number for number, each in enumerate(asked)}
    outputs, preempted = {}, set()
    for _ in range(5000):
        if not engine.llm.llm_engine.has_unfinished_requests():
            break
        outputs |= {int(output.request_id): output for output in engine.step()}
        check_requests(engine.scheduler)
        preempted |= {
            numbers[req_id] for req_id, request in engine.scheduler.requests.items() if request.num_preemptions
        }
        interfere()
    for number, each in enumerate(asked):
        assert tokens_of(outputs[number]) == each.answer, f"{number}: {len(each.prompt)} tokens, {each.rule}"
        check_numbers(outputs[number], **each.rule, intervals=INTERVALS)
    return preempted


def test_64_requests_of_ten_pools_run_together(bounded):
    asked = crowd(bounded, random.Random(3), 64)
    num_tokens = sum(len(each.prompt) + each.num_tokens for each in asked)
    assert num_tokens > 10 * bounded.pool
    assert len(ask_all(bounded.engine, asked)) < len(asked)


def test_a_compaction_of_shared_blocks_without_a_free_one(bounded):
    """Requests with a shared beginning share blocks at their first compaction, when no block is free: others yield."""
    engine, chance = bounded.engine, random.Random(4)
    asked = crowd(bounded, chance, 3, begin=draw(chance, 100))
    num_squeezes = 0

    def shares_blocks(req_id: str) -> bool:
        return engine.managers[-1].req_to_blocks[req_id][0].ref_cnt > 1

    with ExitStack() as squeeze:

        def no_block_free():
            nonlocal num_squeezes
            squeeze.close()
            running, coming = engine.scheduler.running, engine.scheduler._next
            due = [req.request_id for req in running if is_due(req, coming.get(req.request_id))]
            if any(map(shares_blocks, due)):
                squeeze.enter_context(engine.filled_up(0))
                num_squeezes += 1

        assert ask_all(engine, asked, no_block_free)
    assert num_squeezes


def is_due(request, coming) -> bool:
    return coming is not None and coming.position == request.num_computed_tokens


def test_preempted_at_any_time(bounded):
    """All requests at once, before, at and after compactions."""
    engine = bounded.engine
    asked = crowd(bounded, random.Random(5), 3)
    for num_generated in (0, 1, 3, 20, 31, 32, 33, 45):
        is_done = False

        def preempt_all(num_generated=num_generated):
            nonlocal is_done
            furthest = max((request.num_output_tokens for request in engine.scheduler.running), default=-1)
            if not is_done and furthest >= num_generated:
                is_done = engine.scheduler.reset_prefix_cache(reset_running_requests=True)

        assert ask_all(engine, asked, preempt_all)
