"""The search for settings, on a model of which the cost of every choice is known, and its parts on a tiny one."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_l2kv.profile import Shape, Target, ratio_for
from vllm_l2kv.scorers import Heads, bind
from vllm_l2kv.tools.evaluation.progress import Progress
from vllm_l2kv.tools.profile import recommend as module
from vllm_l2kv.tools.profile.calibration import samples
from vllm_l2kv.tools.profile.choices import Case, Choice, answerable, losses, rank
from vllm_l2kv.tools.profile.masked import Losses
from vllm_l2kv.tools.profile.recommend import CONTROL, MEMORIES, choice_of, recommend

NUM_LAYERS = 20
NEEDED = {4: 3.0, 11: 2.0, 17: 1.0}
"""Layers of the made-up model to what an answer loses where they compress."""
SHAPE = Shape(NUM_LAYERS + 1, 2, 8, (*("full_attention",) * NUM_LAYERS, "sliding_attention"))
CASES = [Case(hidden, [0] * 1536, [1, 2], 1) for hidden in (True, False)]


def cost(choice: Choice) -> float:
    ratios = choice.keep_ratios
    lost = sum(loss for layer, loss in NEEDED.items() if ratios[layer] < 1)
    worse = {"l2": 0.5, "keydiff_value": 0.4, "learned": 0.3, CONTROL: 5.0}[choice.scorer]
    rest = [ratio for ratio in ratios[:NUM_LAYERS] if ratio < 1]
    return lost + worse * sum(1 - ratio for ratio in rest) / NUM_LAYERS


@pytest.fixture
def made_up(monkeypatch):
    """A search in which models cost what `cost` says."""

    def of_case(model, case, rows, choices):
        found = torch.tensor([cost(choice) for choice in choices])
        return Losses(found, found < 1)

    def of_cases(model, shape, scorers, cases, choices, progress):
        each = [of_case(model, case, None, choices) for case in cases]
        return Losses(torch.stack([e.loss for e in each]), torch.stack([e.exact for e in each]))

    monkeypatch.setattr(module, "answerable", lambda *_: [CASES] * 6)
    monkeypatch.setattr(module, "rank", lambda *_: None)
    monkeypatch.setattr(module, "losses", of_case)
    monkeypatch.setattr(module, "losses_of_cases", of_cases)

    def search(scorers=("l2", "keydiff_value", "learned", CONTROL)):
        measured = torch.zeros(SHAPE.num_layers)
        # Measured roughly: the layers are among the first ones, not in their order.
        for place, layer in enumerate((17, 3, 11, 9, 4, 1)):
            measured[layer] = 1 - place / 10
        heads = measured[:, None].expand(-1, 2)
        return recommend(None, SHAPE, dict.fromkeys(scorers), [], heads, heads, measured, 6)

    return search


def test_the_layers_that_answers_need_stay_full(made_up):
    found = made_up()
    assert [target.memory for target in found.targets] == list(MEMORIES)
    for target in found.targets:
        assert target.scorer == "learned"
        if target.memory > 0.15:
            assert {4, 11, 17} <= set(target.full_layers), target
    # At the smallest memory there is room for two.
    assert set(found.targets[-1].full_layers) == {4, 11}
    assert found.layer_order[:3] == (4, 11, 17)
    assert sorted(found.layer_order) == list(SHAPE.compressible)


def test_every_setting_costs_its_memory(made_up):
    for target in made_up().targets:
        ratios = choice_of(SHAPE, target).keep_ratios
        assert sum(ratios[:NUM_LAYERS]) / NUM_LAYERS == pytest.approx(target.memory, abs=1e-5)
        assert ratios[NUM_LAYERS] == 1
        assert target.keep_ratio >= 68 / 1536


def test_a_scorer_that_costs_more_has_to_be_better(made_up, monkeypatch):
    monkeypatch.setattr(module, "SAME_LOSS", 0.5)
    assert {target.scorer for target in made_up().targets} == {"l2"}


def test_scorers_that_are_not_there_are_not_tried(made_up):
    assert {target.scorer for target in made_up(("l2", CONTROL)).targets} == {"l2"}


def test_outcomes_compare_with_random_rows_and_with_no_profile(made_up):
    found = made_up()
    assert found.num_questions == (4, 2)
    assert found.outcomes[0].name == "whole cache"
    assert found.outcomes[0].loss == (0, 0)
    by_name = {(outcome.name, outcome.memory): outcome for outcome in found.outcomes}
    for target in found.targets:
        chosen = by_name["recommended", target.memory]
        assert chosen[1:5] == target
        assert chosen.loss == (pytest.approx(cost(choice_of(SHAPE, target)), abs=1e-4),) * 2
        assert {4, 11} <= set(by_name["best with l2", target.memory].full_layers)
        assert by_name["best with learned", target.memory][1:] == chosen[1:]
        assert by_name["recommended layers, random rows", target.memory].loss > chosen.loss
        without = by_name["no profile", target.memory]
        assert (without.full_layers, without.scorer) == ((0, 1), "l2")
        assert without.keep_ratio == ratio_for(target.memory, NUM_LAYERS, 2)


def test_too_few_questions_are_refused(made_up, monkeypatch):
    monkeypatch.setattr(module, "answerable", lambda *_: [CASES] * 2)
    with pytest.raises(ValueError, match="at least 3 questions, got 2"):
        made_up()


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()


def test_what_heads_keep_is_what_the_scorer_ranks_first(tiny, tokenizer):
    shape = Shape(4, 2, 32, ("full_attention",) * 4)
    scorers = bind(Heads(shape.compressible, 0, 2, 2, torch.device("cpu")))
    texts = samples(tokenizer, 200, 1)
    (hidden, seen), *_ = answerable(tiny, shape, texts, 5, Progress())
    assert hidden.context == texts[0].token_ids
    assert seen.context + seen.after == hidden.context + hidden.after
    assert hidden.num_predicted == seen.num_predicted + 1

    rows = rank(tiny, shape, scorers, ["l2"], hidden)
    norms = rows.context.keys[2].norm(dim=-1)
    norms[:, :4] = norms[:, -64:] = 0
    for head in range(2):
        kept = set((rows.places["l2"][2, head] < 100).nonzero()[:, 0].tolist())
        assert kept == set(norms[head].argsort(stable=True)[:100].tolist())

    targets = [Target(1.0, (), 1.0, "l2"), Target(0.5, (0, 1), 0.1, "l2")]
    whole, few = losses(tiny, hidden, rows, [choice_of(shape, target) for target in targets]).loss.tolist()
    with torch.inference_mode():
        logits = tiny(torch.tensor([hidden.context + hidden.after])).logits[0, -hidden.num_predicted - 1 : -1]
    answer = torch.tensor(hidden.after[-hidden.num_predicted :])
    assert whole == pytest.approx(torch.nn.functional.cross_entropy(logits, answer).item(), abs=1e-3)
    assert abs(few - whole) > 1e-3
