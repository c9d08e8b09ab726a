"""Each request's own scorer and granularity apply, through the whole engine."""

from dataclasses import replace

import pytest
import torch
from engine import bare_rule, keep
from reference import Reference, check_numbers
from rules import INTERVALS
from scored import ScoredReference
from weights import made_up_weights, write_profile

from vllm_l2kv import ParamError, compression
from vllm_l2kv.params import EVALUATION_SCORERS, ONE_COMPACTION_SCORERS, PROFILE_SCORERS, SCORERS
from vllm_l2kv.profile import fingerprint
from vllm_l2kv.scorers import Scorer

NUM_TOKENS = 12
OWN = f"{__name__}:HighValues"
FULL_LAYERS = (0,)


class HighValues(Scorer):
    """A scorer as a user may write it, which prefers large values."""

    def score(self, rows):
        return rows.values.float().norm(dim=-1)


class BlockReference(Reference):
    """The paper's rule for blocks of 16 tokens that all heads of a layer share, in loops."""

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


class NeighborReference(Reference):
    """Norms averaged over a row and those beside it, in loops."""

    def _kept(self, index, keys, values, num_keep, first, last):
        kept = []
        for norms in keys.norm(dim=-1).tolist():
            n = len(norms)
            beside = [norms[max(i - 1, 0) : i + 2] for i in range(n)]
            order = sorted((first <= i < n - last, sum(some) / len(some), i) for i, some in enumerate(beside))
            kept.append(sorted(i for _, _, i in order[:num_keep]))
        return torch.tensor([kept])


@pytest.fixture(scope="module")
def weights(llama_reference):
    config = llama_reference.model.config
    return made_up_weights(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)


@pytest.fixture(scope="module")
def engine(llama, weights, run, tmp_path_factory):
    """An engine with every scorer, and one of a user's own."""
    profile = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    write_profile(profile, weights, fingerprint(llama))
    intervals = dict(zip(("prompt_interval", "answer_interval"), INTERVALS, strict=True))
    rule = {"full_layers": FULL_LAYERS, "default_keep_ratio": 1.0, **intervals}
    rule = bare_rule(profile=profile, evaluation_scorers=[*EVALUATION_SCORERS, OWN], **rule)
    with run(llama, FULL_LAYERS, **rule) as engine:
        yield engine


@pytest.fixture(scope="module")
def scored(llama, weights):
    return ScoredReference(llama, len(FULL_LAYERS), weights)


@pytest.fixture
def plain_settings(engine, monkeypatch):
    """The settings of a serving engine without a profile."""
    settings = replace(engine.scheduler.settings, profile=None, evaluation_scorers=())
    monkeypatch.setattr(engine.scheduler, "settings", settings)


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


def test_a_scorer_of_a_user(engine, llama, text_ids):
    class ByValues(Reference):
        def _kept(self, index, keys, values, num_keep, first, last):
            return values.norm(dim=-1).topk(num_keep).indices.sort().values[None]

    prompt = text_ids[40:440]
    answer, other = engine.tokens([prompt] * 2, [ask(OWN), ask("l2")])
    assert answer == ByValues(llama).generate(prompt, NUM_TOKENS, "0.5", FULL_LAYERS)
    assert answer != other


@pytest.mark.parametrize(("first", "last"), [(0, 0), (4, 40)])
def test_all_scorers_of_many_compactions_in_one_batch(engine, scored, text_ids, first, last):
    """The final rows depend on the scorer at each compaction, in the prompt and in the answer."""
    prompt, names = text_ids[40:440], [name for name in SCORERS if name not in ONE_COMPACTION_SCORERS]
    rule = {"ratio": "1", "first": first, "last": last, "budget": 60}
    outputs = engine.generate([prompt] * len(names), [keep(**rule, scorer=name) for name in names])
    rule["intervals"] = INTERVALS
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    for scorer, answer, output in zip(names, answers, outputs, strict=True):
        scored.scorer = scorer
        assert answer == scored.generate(prompt, NUM_TOKENS, full_layers=FULL_LAYERS, **rule), scorer
        assert check_numbers(output, **rule)["compactions"] > 6
    assert len(set(map(tuple, answers))) >= len(names) - 2, "scorers should differ"


@pytest.mark.parametrize(
    ("field", "value"), [*(("scorer", name) for name in ONE_COMPACTION_SCORERS), ("granularity", "block")]
)
def test_what_one_compaction_alone_defines_is_refused_with_a_budget(engine, text_ids, field, value):
    """The error names the scorer and fails that request alone, also without a front end. Without a budget it works."""
    sentence = f"kv_{field} '{value}' is defined for a single compaction"
    with pytest.raises(ParamError, match=sentence):
        compression(0.5, max_tokens=100, **{field: value})
    alone, both = keep("0.5"), keep("0.5")
    alone.extra_args = compression(0.5, **{field: value})
    both.extra_args = {**alone.extra_args, "kv_max_tokens": 100}
    good, bad = engine.generate([text_ids[:200]] * 2, [alone, both])
    assert good.outputs[0].finish_reason == "length"
    assert bad.outputs[0].finish_reason == "error"
    assert sentence in bad.outputs[0].stop_reason


def test_scorers_that_an_engine_does_not_have_are_refused(plain_settings, engine, text_ids):
    """The error names the scorer and fails that request alone, also without a front end."""
    names = [*EVALUATION_SCORERS, *PROFILE_SCORERS, OWN]
    outputs = engine.generate([text_ids[:200]] * (len(names) + 1), [keep("0.5"), *(ask(name) for name in names)])
    assert outputs[0].outputs[0].finish_reason == "length"
    for name, output in zip(names, outputs[1:], strict=True):
        assert output.outputs[0].finish_reason == "error"
        assert f"kv_scorer '{name}'" in output.outputs[0].stop_reason


@pytest.mark.parametrize("last", [0, 8])
@pytest.mark.parametrize("length", [30, 200, 333])
def test_all_granularities_in_one_batch(engine, llama, llama_reference, text_ids, length, last):
    prompt = text_ids[40 : 40 + length]
    references = {"token": llama_reference, "neighbors": NeighborReference(llama), "block": BlockReference(llama)}
    answers = engine.tokens([prompt] * 3, [ask(last=last, granularity=name) for name in references])
    for (name, reference), answer in zip(references.items(), answers, strict=True):
        assert answer == reference.generate(prompt, NUM_TOKENS, "0.5", FULL_LAYERS, 0, last), name
    assert len(set(map(tuple, answers))) == 3


def test_neighbors_with_a_budget(engine, llama, text_ids):
    """At later compactions the rows beside a row are those that were kept."""
    prompt, rule = text_ids[40:440], {"ratio": "1", "first": 4, "last": 8, "budget": 60}
    pooled, alone = keep(**rule), keep(**rule)
    pooled.extra_args = {**pooled.extra_args, "kv_granularity": "neighbors"}
    pooled, alone = engine.generate([prompt] * 2, [pooled, alone])
    rule["intervals"] = INTERVALS
    expected = NeighborReference(llama).generate(prompt, NUM_TOKENS, full_layers=FULL_LAYERS, **rule)
    assert list(pooled.outputs[0].token_ids) == expected != list(alone.outputs[0].token_ids)
    assert check_numbers(pooled, **rule)["compactions"] > 6


def test_the_defaults_are_l2_and_token(engine, text_ids):
    prompt = text_ids[40:440]
    unnamed, named = engine.tokens([prompt] * 2, [keep("0.5", num_tokens=NUM_TOKENS), ask("l2", granularity="token")])
    assert unnamed == named
