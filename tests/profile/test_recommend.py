"""The search for settings, on a made-up model with a known cost of every choice, and its parts on a tiny model."""

from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_l2kv.kv_heads import MAX_WASTE, waste
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import num_keep
from vllm_l2kv.profile import Ranking, Shape, Target, ratio_for
from vllm_l2kv.scorers import Heads, bind
from vllm_l2kv.tools.profile import choices as choices_module
from vllm_l2kv.tools.profile import recommend as module
from vllm_l2kv.tools.profile.calibration import ASKED_KINDS, Question, Sample, asked_samples
from vllm_l2kv.tools.profile.choices import Case, Choice, answerable, kinds_of, losses, losses_of_cases, rank
from vllm_l2kv.tools.profile.make import Amounts
from vllm_l2kv.tools.profile.masked import Losses, answer_losses
from vllm_l2kv.tools.profile.recommend import (
    CHOOSERS,
    FEW_QUESTIONS,
    MEMORIES,
    NUM_BEST,
    NUM_LAST,
    SCORERS,
    SOME_QUESTIONS,
    Recommendation,
    choice_of,
    recommend,
)
from vllm_l2kv.tools.progress import Progress

NUM_LAYERS = 20
NEEDED = {(4, 0): 3.0, (11, 1): 2.0, (17, 0): 1.0}
"""For layers and heads of the made-up model, the loss of an answer if they compress."""
NEEDED_HEADS = {4: (0,), 11: (1,), 17: (0,)}
SHAPE = Shape(NUM_LAYERS + 1, 2, 8, (*("full_attention",) * NUM_LAYERS, "sliding_attention"))


def question(number: int) -> list[Case]:
    """Returns the two cases of a question; kinds alternate."""
    kind = ASKED_KINDS[number % len(ASKED_KINDS)]
    return [Case(kind, hidden, [number] * 1536, [1, 2], 1) for hidden in (True, False)]


NUM_QUESTIONS = SOME_QUESTIONS + 32
QUESTIONS = [question(i) for i in range(NUM_QUESTIONS)]
OTHERS = [question(NUM_QUESTIONS + i) for i in range(8)]


def loss(choice: Choice) -> float:
    ratios = choice.keep_ratios
    lost = sum(loss for (layer, head), loss in NEEDED.items() if ratios[layer][head] < 1)
    worse = {"l2": 0.5, "keydiff_value": 0.4, "learned": 0.3, "random": 5.0}[choice.ranking.scorer]
    rest = [1 - ratio for of_layer in ratios[:NUM_LAYERS] for ratio in of_layer]
    return lost + worse * sum(rest) / len(rest)


@pytest.fixture
def made_up(monkeypatch):
    """Returns a search in which answers lose `loss`, plus `more` for a case."""

    def of_case(model, case, rows, choices):
        found = torch.tensor([loss(choice) + search.more(case, choice) for choice in choices])
        return Losses(found, found < 1)

    def of_cases(model, shape, scorers, cases, choices, progress):
        search.asked.append((len(cases), len(choices)))
        each = [of_case(model, case, None, choices) for case in cases]
        return Losses(torch.stack([e.loss for e in each]), torch.stack([e.exact for e in each]))

    monkeypatch.setattr(module, "rank", lambda *_: None)
    monkeypatch.setattr(module, "losses", of_case)
    monkeypatch.setattr(module, "losses_of_cases", of_cases)

    def search(questions=QUESTIONS, others=OTHERS, num_ranks=1):
        measured = torch.zeros(SHAPE.num_layers)
        # A rough measurement: the right layers are among the first ones, but not in order.
        for place, layer in enumerate((17, 3, 11, 9, 4, 1)):
            measured[layer] = 1 - place / 10
        heads = measured[:, None].expand(-1, 2)
        head_loss = torch.zeros(SHAPE.num_layers, 2)
        for (layer, head), lost in NEEDED.items():
            head_loss[layer, head] = lost
        ranks = {"retrieval": heads, "repetition": heads, "loss": measured, "head_loss": head_loss}
        scorers = dict.fromkeys((*SCORERS, "random"))
        return recommend(None, SHAPE, scorers, questions, others, ranks, num_ranks, Progress())

    search.more = lambda case, choice: 0.0
    search.asked = []
    return search


def of_layers(found: Recommendation) -> list[Target]:
    return [target for target in found.targets if target.classes == "layers"]


def of_heads(found: Recommendation) -> list[Target]:
    return [target for target in found.targets if target.classes == "heads"]


def test_the_layers_that_answers_need_stay_full(made_up):
    found = made_up()
    targets = of_layers(found)
    assert [target.memory for target in targets] == list(MEMORIES)
    for target in targets:
        assert target.scorer == "learned"
        if target.memory > 0.15:
            assert {4, 11, 17} <= set(target.full_layers), target
    # At the smallest memory there is room for two.
    assert set(targets[-1].full_layers) == {4, 11}
    assert found.layer_order[:3] == (4, 11, 17)
    assert sorted(found.layer_order) == list(SHAPE.compressible)


def test_the_heads_that_answers_need_stay_full(made_up):
    """Also at the smallest memory, which has no room for their whole layers."""
    found = made_up()
    targets = of_heads(found)
    assert [target.memory for target in targets] == list(MEMORIES)
    for target in targets:
        assert target.full_layers == ()
        for layer, (head,) in NEEDED_HEADS.items():
            assert head in target.full_heads[layer], target
        num_full = SHAPE.num_full((), target.full_heads)
        assert waste(num_full, SHAPE.num_heads - num_full) <= MAX_WASTE
    assert loss(choice_of(SHAPE, targets[-1])) < 1 < loss(choice_of(SHAPE, of_layers(found)[-1]))


def test_every_scorer_has_a_setting(made_up):
    """Those that are not recommended are the best with their scorer."""
    found = made_up()
    every = sorted((each.classes, each.memory, each.scorer) for each in (*found.targets, *found.others))
    assert every == sorted(product(("heads", "layers"), MEMORIES, SCORERS))
    by_name = {(outcome.name, outcome.memory): outcome for outcome in found.outcomes}
    for target in found.others:
        assert target.scorer != "learned"
        best = "best heads with" if target.classes == "heads" else "best with"
        assert by_name[f"{best} {target.scorer}", target.memory][1:7] == target


def test_every_setting_costs_its_memory(made_up):
    found = made_up()
    for target in (*found.targets, *found.others):
        ratios = choice_of(SHAPE, target).keep_ratios
        assert sum(map(sum, ratios[:NUM_LAYERS])) / NUM_LAYERS / 2 == pytest.approx(target.memory, abs=1e-5)
        assert ratios[NUM_LAYERS] == (1, 1)
        assert target.keep_ratio >= 68 / 1536


def test_all_settings_are_tried_on_few_questions_and_the_best_on_more(made_up):
    found = made_up()
    assert made_up.asked.pop()[0] == 2 * len(OTHERS)
    of_layers, of_heads = made_up.asked[:4], made_up.asked[4:]
    asked = FEW_QUESTIONS, SOME_QUESTIONS, len(QUESTIONS), len(QUESTIONS)
    for of_units in (of_layers, of_heads):
        assert tuple(num_cases for num_cases, _ in of_units) == tuple(2 * num for num in asked)
    tried = [of_layer + of_head for (_, of_layer), (_, of_head) in zip(of_layers, of_heads, strict=True)]
    assert found.rounds == tuple(zip(asked, tried, strict=True))
    each = 2 * len(MEMORIES) * len(CHOOSERS)
    assert tried[0] > tried[1]
    assert NUM_BEST * each < tried[1] <= 2 * NUM_BEST * each
    assert tried[2] == NUM_LAST * each < tried[1]
    assert 2 * len(MEMORIES) <= tried[3] <= each
    assert tried[0] < found.num_tried < tried[0] + tried[1] + tried[3]
    assert found.searched == dict.fromkeys(ASKED_KINDS, len(QUESTIONS) / 4)
    assert found.judged == dict.fromkeys(ASKED_KINDS, len(OTHERS) / 4)


@pytest.mark.parametrize("num", [4, FEW_QUESTIONS + 12, SOME_QUESTIONS + 1])
def test_with_few_questions_later_rounds_ask_all_of_them(made_up, num):
    found = made_up(questions=QUESTIONS[:num])
    assert [each.questions for each in found.rounds] == [min(num, FEW_QUESTIONS), min(num, SOME_QUESTIONS), num, num]
    assert [target.memory for target in of_layers(found)] == list(MEMORIES)


@pytest.mark.parametrize("num", [FEW_QUESTIONS, SOME_QUESTIONS])
def test_what_does_well_on_the_first_questions_alone_is_not_chosen(made_up, num):
    made_up.more = lambda case, choice: 9.0 * (choice.ranking.scorer == "learned" and case.context[0] >= num)
    assert {target.scorer for target in made_up().targets} == {"keydiff_value"}


def test_a_setting_that_is_best_on_the_first_questions_alone_is_not_chosen(made_up):
    """The best settings fail in the third round, so the second best ones are chosen."""
    lucky = {choice_of(SHAPE, target) for target in made_up().targets}
    made_up.more = lambda case, choice: 9.0 * (choice in lucky and case.context[0] >= SOME_QUESTIONS)
    for target in made_up().targets:
        assert choice_of(SHAPE, target) not in lucky


def test_answers_of_one_kind_that_fail_altogether_are_not_outweighed_by_little_losses(made_up):
    """By the mean loss `learned` would be best, since it saves more nats than one kind loses."""
    made_up.more = lambda case, choice: (
        1.2 * (case.kind == "facts_in_noise")
        if choice.ranking.scorer == "learned"
        else 0.4 * (choice.ranking.scorer != "random")
    )
    found = made_up()
    assert found.targets[0].memory == 0.75
    assert found.targets[0].scorer != "learned"
    by_name = {(outcome.name, outcome.memory): outcome for outcome in found.outcomes}
    learned = by_name["best with learned", 0.75]
    assert sum(learned.loss) < sum(by_name["recommended", 0.75].loss)
    assert learned.exact == (0.75, 0.75)
    assert learned.exact_by_kind == dict.fromkeys(ASKED_KINDS, (1.0, 1.0)) | {"facts_in_noise": (0.0, 0.0)}


def test_outcomes_tell_hidden_from_seen(made_up):
    made_up.more = lambda case, choice: 9.0 * (case.hidden and case.kind == "table")
    whole = made_up().outcomes[0]
    assert whole.loss == (9 / 4, 0)
    assert whole.exact == (0.75, 1.0)
    assert whole.exact_by_kind["table"] == (0.0, 1.0)


def test_settings_go_by_neighbors_in_the_search_and_in_the_profile(made_up):
    searched = set()

    def record(case, choice):
        if case.context[0] < NUM_QUESTIONS:
            searched.add(choice.ranking)
        return 0.0

    made_up.more = record
    found = made_up()
    assert {target.granularity for target in (*found.targets, *found.others)} == {"neighbors"}
    assert searched == {Ranking(scorer, "neighbors") for scorer in SCORERS}


def test_a_scorer_that_takes_longer_has_to_be_better(made_up, monkeypatch):
    monkeypatch.setattr(module, "SAME_COST", 0.5)
    assert {target.scorer for target in made_up().targets} == {"l2"}


def test_a_scorer_with_trained_weights_does_not_choose_what_stays_full(made_up):
    """It answers these questions with nothing full, but is tried only with what the other scorers left full."""
    made_up.more = lambda case, choice: (
        -9.0 * (choice.ranking.scorer == "learned" and 1.0 not in sum(choice.keep_ratios[:NUM_LAYERS], ()))
    )
    found = made_up()
    every = (*found.targets, *found.others)
    of_learned = [each for each in every if each.scorer == "learned"]
    chosen = [(each.memory, each.full_layers, each.full_heads) for each in every if each.scorer in CHOOSERS]
    assert len(of_learned) == 2 * len(MEMORIES)
    for each in of_learned:
        assert (each.memory, each.full_layers, each.full_heads) in chosen


def test_outcomes_compare_with_random_rows_and_with_no_profile(made_up):
    found = made_up()
    assert found.outcomes[0].name == "whole cache"
    assert found.outcomes[0].loss == (0, 0)
    by_name = {(outcome.name, outcome.memory): outcome for outcome in found.outcomes}
    for target in of_heads(found):
        chosen = by_name["recommended heads", target.memory]
        assert chosen[1:7] == target
        assert by_name["recommended heads, random rows", target.memory].loss > chosen.loss
        assert by_name["best heads with learned", target.memory][1:] == chosen[1:]
    for target in of_layers(found):
        chosen = by_name["recommended", target.memory]
        assert chosen[1:7] == target
        assert chosen.loss == (pytest.approx(loss(choice_of(SHAPE, target)), abs=1e-4),) * 2
        assert {4, 11} <= set(by_name["best with l2", target.memory].full_layers)
        assert by_name["best with learned", target.memory][1:] == chosen[1:]
        assert by_name["recommended layers, random rows", target.memory].loss > chosen.loss
        without = by_name["no profile", target.memory]
        assert (without.full_layers, without.scorer) == ((0, 1), "l2")
        assert without.keep_ratio == ratio_for(target.memory, NUM_LAYERS, 2)


def test_a_search_without_questions_is_refused(made_up):
    for questions, others in (([], OTHERS), (QUESTIONS, [])):
        with pytest.raises(ValueError, match="The search has no questions; raise --samples or --tokens"):
            made_up(questions=questions, others=others)


def test_the_search_may_read_as_many_texts_as_its_questions_need():
    amounts = Amounts(112, 1536, 384)
    assert [amounts.texts_for(num) for num in (384, 192, 4)] == [768, 384, 112]


def test_questions_are_balanced_and_no_more_texts_are_read_than_needed(monkeypatch):
    read = []

    def texts(kind):
        for number in range(9):
            yield Sample(kind, [number], [Question([number], [i, i], (0, 1)) for i in range(2)])

    def answered(model, context, token_ids, num_predicted, keep):
        # Answers every second text with a table, and no fact in noise; the second questions lose less.
        kind, (number,) = read[-1]
        wrong = kind == "facts_in_noise" or (kind == "table" and number % 2 == 0)
        return Losses(torch.tensor([float(wrong) - token_ids[-1] / 10]), torch.tensor([not wrong]))

    class Read:
        num_tokens = 1

    def reading(kind):
        for sample in texts(kind):
            read.append((kind, sample.token_ids))
            yield sample

    monkeypatch.setattr(choices_module, "read", lambda model, token_ids: Read)
    monkeypatch.setattr(choices_module, "answer_losses", answered)
    found = answerable(None, SHAPE, [reading(kind) for kind in ASKED_KINDS], 14, Progress())
    assert [hidden.kind for hidden, _ in found] == [*(ASKED_KINDS * 4)][:14]
    assert kinds_of(found) == dict(zip(ASKED_KINDS, (4, 4, 3, 3), strict=True))
    num_read = {kind: sum(of == kind for of, _ in read) for kind in ASKED_KINDS}
    assert num_read == dict(zip(ASKED_KINDS, (2, 9, 2, 4), strict=True))
    numbers = {
        kind: [(hidden.context[0], hidden.after[-1]) for hidden, _ in found if hidden.kind == kind] for kind in num_read
    }
    assert numbers["facts"] == [(0, 0), (0, 1), (1, 0)]
    assert numbers["table"] == [(1, 0), (1, 1), (3, 0)]
    assert numbers["facts_in_noise"] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    # A kind without further questions does not change the others.
    assert kinds_of(answerable(None, SHAPE, [reading("facts"), ()], 4, Progress())) == {"facts": 2}


def test_a_context_of_several_cases_is_read_once(monkeypatch):
    read = []

    def ranked(model, shape, scorers, rankings, case):
        read.append(case.context)
        return tuple(case.context)

    def answered(model, case, rows, choices):
        assert rows == tuple(case.context)
        return Losses(torch.tensor([float(case.after[0])]), torch.tensor([False]))

    monkeypatch.setattr(choices_module, "rank", ranked)
    monkeypatch.setattr(choices_module, "losses", answered)
    cases = [Case("facts", True, context, [i, 0], 1) for i, context in enumerate(([1], [2, 3], [1], [4], [2, 3]))]
    choice = choice_of(SHAPE, Target(0.5, (), 0.5, "l2"))
    found = losses_of_cases(None, SHAPE, {}, cases, [choice], Progress())
    assert found.loss[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert read == [[1], [2, 3], [4]]


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()


def test_what_heads_keep_is_what_the_scorer_ranks_first(tiny, tokenizer):
    shape = Shape(4, 2, 32, ("full_attention",) * 4)
    scorers = bind(Heads.of_rank(shape.compressible, 2, 0, 1, torch.device("cpu")))
    text = next(asked_samples(tokenizer, 200, 1, 0)[0])
    (hidden, seen), *_ = answerable(tiny, shape, [[text]], 5, Progress())
    assert (hidden.kind, hidden.context) == ("facts_in_prose", text.token_ids)
    assert (hidden.hidden, seen.hidden) == (True, False)
    assert seen.context + seen.after == hidden.context + hidden.after
    assert hidden.num_predicted == seen.num_predicted + 1

    rows = rank(tiny, shape, scorers, [Ranking("l2")], hidden)
    norms = rows.context.keys[2].norm(dim=-1)
    norms[:, :4] = norms[:, -64:] = 0
    for head in range(2):
        kept = set((rows.places[Ranking("l2")][2, head] < 100).nonzero()[:, 0].tolist())
        assert kept == set(norms[head].argsort(stable=True)[:100].tolist())

    targets = [Target(1.0, (), 1.0, "l2"), Target(0.5, (0, 1), 0.1, "l2")]
    whole, few = losses(tiny, hidden, rows, [choice_of(shape, target) for target in targets]).loss.tolist()
    with torch.inference_mode():
        logits = tiny(torch.tensor([hidden.context + hidden.after])).logits[0, -hidden.num_predicted - 1 : -1]
    answer = torch.tensor(hidden.after[-hidden.num_predicted :])
    assert whole == pytest.approx(torch.nn.functional.cross_entropy(logits, answer).item(), abs=1e-3)
    assert abs(few - whole) > 1e-3

    keep = torch.ones(1, 4, 2, len(hidden.context), dtype=torch.bool)
    few_rows = rows.places[Ranking("l2")][2, 0] < num_keep(len(hidden.context), CompressionParams(0.1))
    keep[0, 2, 0] = few_rows
    all_but_one = Target(1.0, (0, 1), 0.1, "l2", {2: (1,), 3: (0, 1)})
    (one_head,) = losses(tiny, hidden, rows, [choice_of(shape, all_but_one)]).loss.tolist()
    expected = answer_losses(tiny, rows.context, hidden.after, hidden.num_predicted, keep).loss.item()
    assert one_head == pytest.approx(expected, abs=1e-5)
    assert abs(one_head - whole) > 1e-5
