"""What a request names as its scorer and granularity decides, through the whole engine."""

import pytest
import torch
from engine import keep
from reference import Reference
from scored import ScoredReference

from vllm_l2kv import compression
from vllm_l2kv.params import SCORERS

NUM_TOKENS = 12
FULL_LAYERS = (0,)


class BlockReference(Reference):
    """The rule of the paper for blocks of 16 tokens that all heads of a layer share, in loops."""

    def _kept(self, index, keys, values, num_keep, first, last):
        num_kv_heads, n = keys.shape[:2]
        norms = keys.norm(dim=-1).tolist()
        order = []
        for begin in range(0, n, 16):
            block = range(begin, min(begin + 16, n))
            mean = sum(norms[head][i] for head in range(num_kv_heads) for i in block) / (num_kv_heads * len(block))
            order += [(first <= i < n - last, mean, i) for i in block]
        kept = sorted(i for _, _, i in sorted(order)[:num_keep])
        return torch.tensor([[kept] * num_kv_heads])


@pytest.fixture(scope="module")
def scored(llama):
    return ScoredReference(llama, len(FULL_LAYERS))


def ask(scorer=None, last=0, granularity=None):
    params = keep("0.5", num_tokens=NUM_TOKENS)
    params.extra_args = compression(0.5, protect_last=last, scorer=scorer, granularity=granularity)
    return params


@pytest.mark.parametrize("last", [0, 8])
def test_all_scorers_in_one_batch(engine, scored, text_ids, last):
    prompt = text_ids[40:440]
    answers = engine.tokens([prompt] * len(SCORERS), [ask(scorer, last) for scorer in SCORERS])
    for scorer, answer in zip(SCORERS, answers, strict=True):
        scored.scorer = scorer
        assert answer == scored.generate(prompt, NUM_TOKENS, "0.5", FULL_LAYERS, 0, last), scorer
    assert len(set(map(tuple, answers))) >= len(SCORERS) - 2, "scorers should differ"


@pytest.mark.parametrize("last", [0, 8])
@pytest.mark.parametrize("length", [30, 200, 333])
def test_blocks_beside_tokens(engine, llama, llama_reference, text_ids, length, last):
    prompt = text_ids[40 : 40 + length]
    arguments = prompt, NUM_TOKENS, "0.5", FULL_LAYERS, 0, last
    blocks, tokens = engine.tokens([prompt] * 2, [ask(last=last, granularity=name) for name in ("block", "token")])
    assert blocks == BlockReference(llama).generate(*arguments)
    assert tokens == llama_reference.generate(*arguments)
    assert blocks != tokens


def test_the_defaults_are_l2_and_token(engine, text_ids):
    prompt = text_ids[40:440]
    unnamed, named = engine.tokens([prompt] * 2, [keep("0.5", num_tokens=NUM_TOKENS), ask("l2", granularity="token")])
    assert unnamed == named
