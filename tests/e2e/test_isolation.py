"""No request reads another one's rows: all rows in the tables of running requests are compared.

Hundreds of requests of mixed ratios, budgets and documents go through a cache that holds a few of them. Many have the
same beginning and find rows of others, whole or compressed; then each has canaries, tokens that no other request has.
The expected rows come from Hugging Face `transformers`: with full layer 0, those of layers 0 and 1 depend on the
request's tokens alone, also after a compaction.
"""

import random
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import pytest
import torch
from cached_rows import CachedRows
from engine import bare_rule, keep, running
from reference import Reference, expected_compactions

NUM_REQUESTS = 300
NUM_CANARIES = 12
VOCAB_SIZE = 49152
RATIOS = ("1.0", "0.9", "0.5", "0.3", "0.1")
INTERVALS = (64, 16)
RULES = [{"ratio": ratio} for ratio in RATIOS] + [{"ratio": "1", "budget": 24}, {"ratio": "0.5", "budget": 40}]
SHARED = {
    60: {"ratio": "0.4", "document": 60},
    99: {"ratio": "0.8", "document": 99},
    95: {"ratio": "0.5", "document": 95, "budget": 40},
    24 + INTERVALS[0]: {"ratio": "1", "budget": 24},
}
"""Rules of half of the requests, equal for neighbours, by the tokens after which rows may be found."""
NUM_NEIGHBOURS = 30
BEGINNINGS = (0, 31, 100, 100)
"""Lengths of shared beginnings. The last is longer than anything that can be found."""
TOLERANCE = 1e-3
"""Tolerance relative to a row's norm. Measured: at most 0.00001 to its own row, at least 0.09 to another one."""
STEPS_BETWEEN_LOOKS = 4


@pytest.fixture(scope="module")
def engine(llama):
    """An engine with 70 blocks. A request holds up to 3 + 9 of them, and 30 may run at once."""
    small = {"max_model_len": 512, "max_num_batched_tokens": 128, "max_num_seqs": 30, "num_gpu_blocks_override": 70}
    rule = bare_rule(full_layers=(0,), prompt_interval=INTERVALS[0], answer_interval=INTERVALS[1])
    with running(llama, **rule, **small) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(llama):
    return Reference(llama)


@pytest.fixture(scope="module")
def prompts(text_ids) -> list[list[int]]:
    """Returns prompts: beginnings that some share with their neighbours, then words and canaries."""
    chance = random.Random(0)
    unused = sorted(set(range(3, VOCAB_SIZE)) - set(text_ids))
    canaries = iter(chance.sample(unused, NUM_REQUESTS * NUM_CANARIES))
    prompts = []
    for number in range(NUM_REQUESTS):
        begin = 200 * (number // NUM_NEIGHBOURS % 5)
        words = text_ids[begin + 100 : begin + 100 + chance.randint(0, 80)]
        own = words + [next(canaries) for _ in range(NUM_CANARIES)]
        chance.shuffle(own)
        prompts.append(text_ids[begin : begin + chance.choice(BEGINNINGS)] + own)
    return prompts


class OwnRows:
    """Rows that each layer computes from a request's own tokens; each call computes only the new tokens."""

    def __init__(self, reference) -> None:
        self.reference = reference
        self.caches = defaultdict(reference.new_cache)

    @torch.inference_mode()
    def of(self, req_id: str, tokens: list[int]) -> list[torch.Tensor]:
        """Returns rows like `CachedRows.of`; a preempted request may have fewer tokens than before, but no others."""
        cache = self.caches[req_id]
        new = tokens[cache.get_seq_length() :]
        if new:
            self.reference.model(torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [torch.cat([layer.keys[0], layer.values[0]], dim=-1)[:, : len(tokens)] for layer in cache.layers]


def distances(found: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Returns the distance of each found row from each own row, relative to the latter's norm."""
    return torch.cdist(found, own, compute_mode="donot_use_mm_for_euclid_dist") / own.norm(dim=-1)[:, None]


def check_equal(found: torch.Tensor, own: torch.Tensor) -> None:
    """Compares row by row."""
    far = (found - own).norm(dim=-1) / own.norm(dim=-1)
    assert (far < TOLERANCE).all(), f"rows {(far >= TOLERANCE).nonzero().tolist()[:9]} are not its own"


def check_kept(found: torch.Tensor, own: torch.Tensor) -> None:
    """Checks that every row is the request's own, in order and without repetition."""
    nearest = distances(found, own).min(dim=-1)
    assert (nearest.values < TOLERANCE).all(), "kept rows are not its own"
    assert all(before < after for head in nearest.indices.tolist() for before, after in pairwise(head))


def check_rows(engine, rows: CachedRows, own_rows: OwnRows, request, rule) -> None:
    """Checks all rows that attention reads for this request, except those that cannot be predicted."""
    req_id, num_tokens = request.request_id, request.num_computed_tokens
    num_evicted = engine.num_evicted(req_id)
    assert engine.worker.num_evicted().get(req_id, 0) == num_evicted
    found = rows.of(req_id, num_tokens, num_evicted)
    own = own_rows.of(req_id, list(request.all_token_ids[:num_tokens]))
    left = expected_compactions(request.num_prompt_tokens, num_tokens, **rule, intervals=INTERVALS)
    num_kept = {position - kept: kept for position, kept in left.items()}.get(num_evicted, 0)
    last = num_kept + num_evicted  # number of tokens at the last compaction
    for layer, expected in enumerate(own):
        if num_evicted == 0 or layer == 0:
            check_equal(found[layer], expected)
            continue
        assert num_kept
        # Rows of later tokens in later layers depend on the earlier evictions.
        if layer == 1 or last == min(left):
            check_kept(found[layer][:, :num_kept], expected[:, :last])
        if layer == 1:
            check_equal(found[layer][:, num_kept:], expected[:, last:])


def check_answer(reference, prompt, answer, rule) -> None:
    """Checks that the answer equals that of the request alone, preempted or not."""
    assert answer == reference.greedy(prompt, answer, full_layers=(0,), **rule, intervals=INTERVALS)


def holds_shared_block(engine, req_id: str) -> bool:
    return any(block.ref_cnt > 1 for block in engine.managers[-1].req_to_blocks[req_id])


def rule_for(number, prompt, chance) -> dict[str, Any]:
    shared = list(SHARED.values())[number // NUM_NEIGHBOURS % len(SHARED)]
    return shared if chance.random() < 0.5 and shared.get("document", 0) < len(prompt) else chance.choice(RULES)


def test_every_row_belongs_to_its_request(engine, reference, prompts):
    chance = random.Random(1)
    rules = [rule_for(number, prompt, chance) for number, prompt in enumerate(prompts)]
    numbers, preempted, compacted_before, answers, looks = {}, set(), set(), {}, Counter()
    for number, (prompt, rule) in enumerate(zip(prompts, rules, strict=True)):
        numbers[engine.add(str(number), prompt, keep(**rule, num_tokens=chance.randint(2, 90)))] = number
    rows, own_rows = CachedRows(engine), OwnRows(reference)
    step = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        answers.update({int(output.request_id): output for output in engine.step()})
        preempted |= {
            numbers[req_id] for req_id, request in engine.scheduler.requests.items() if request.num_preemptions
        }
        just_compacted = set()
        for request in engine.scheduler.running:
            number = numbers[request.request_id]
            if engine.num_evicted(request.request_id) and number not in compacted_before:
                compacted_before.add(number)
                just_compacted.add(request.request_id)
        step += 1
        for request in engine.scheduler.running if step % STEPS_BETWEEN_LOOKS == 0 else ():
            rule = rules[numbers[request.request_id]]
            check_rows(engine, rows, own_rows, request, rule)
            compacted = engine.num_evicted(request.request_id) > 0
            looks["just compacted"] += request.request_id in just_compacted
            looks["compacted"] += compacted
            looks["compacted and shared"] += compacted and holds_shared_block(engine, request.request_id)
            looks["compacted anew"] += compacted and request.num_preemptions > 0
            looks["rows of an answer evicted"] += engine.num_evicted(request.request_id) > request.num_prompt_tokens
            looks["in prefill"] += request.num_computed_tokens < request.num_prompt_tokens
            looks["whole"] += not compacted
    engine.check_whole()
    print(f"{step} steps, {len(preempted)} preempted, looks {dict(looks)}")
    found = Counter(output.kv_transfer_params["kv_cache"].get("found_tokens", 0) for output in answers.values())
    print(f"tokens whose compressed rows were found, and how often: {dict(found)}")
    moments = ["just compacted", "compacted", "compacted anew", "compacted and shared"]
    moments += ["rows of an answer evicted", "in prefill", "whole"]
    assert all(looks[moment] for moment in moments)
    assert len(answers) == len(prompts)
    assert {*SHARED} <= {*found}
    ordinary = [
        output for output in answers.values() if output.kv_transfer_params["kv_cache"].get("found_tokens", 0) == 0
    ]
    assert any(output.num_cached_tokens for output in ordinary), "some share a beginning"
    for number, output in answers.items():
        answer = list(output.outputs[0].token_ids)
        check_answer(reference, prompts[number], answer, rules[number])


def test_users_with_other_salts_share_no_block(engine, text_ids):
    """Their prompts are equal. Requests of one user do share blocks, otherwise this would show little."""
    users: dict[str, str] = {}
    for number in range(40):
        salt = ("mine", "yours")[number % 2]
        prompt = {"prompt_token_ids": text_ids[: (200, 130)[number // 2 % 2]], "cache_salt": salt}
        before = set(engine.scheduler.requests)
        rule = [*({"ratio": ratio} for ratio in RATIOS), *SHARED.values()][number // 4 % 9]
        engine.llm.llm_engine.add_request(f"salt {number}", prompt, keep(**rule, num_tokens=20))
        (req_id,) = set(engine.scheduler.requests) - before
        users[req_id] = salt
    shared, outputs = 0, {}
    while engine.llm.llm_engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
        holders: dict[int, list[str]] = {}
        for manager in engine.managers:
            for req_id, blocks in manager.req_to_blocks.items():
                for block in blocks:
                    holders.setdefault(block.block_id, []).append(users[req_id])
        assert all(len(set(salts)) == 1 for salts in holders.values())
        shared += sum(len(salts) > 1 for salts in holders.values())
    assert shared
    assert any(output.kv_transfer_params["kv_cache"].get("found_tokens") for output in outputs.values())
    engine.check_whole()
