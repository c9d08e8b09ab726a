"""Calibration texts and the questions about them."""

import pytest

from vllm_l2kv.tools.evaluation.texts import SAMPLES, read_text
from vllm_l2kv.tools.profile.calibration import (
    ASKED_KINDS,
    ASKED_LENGTHS,
    KINDS,
    NOVELS,
    _novel,
    asked_samples,
    samples,
)

NUM_TOKENS = 300


@pytest.fixture(scope="module")
def drawn(tokenizer):
    return samples(tokenizer, NUM_TOKENS, len(KINDS), seed=3)


def test_texts_of_all_kinds_have_the_length_that_was_asked_for(drawn, tokenizer):
    assert [sample.kind for sample in drawn] == list(KINDS)
    assert {len(sample.token_ids) for sample in drawn} == {NUM_TOKENS}
    assert {sample.token_ids[0] for sample in drawn} == {tokenizer.bos_token_id}
    assert len({tuple(sample.token_ids) for sample in drawn}) == len(KINDS)


def test_the_same_seed_draws_the_same_texts_whatever_their_number(drawn, tokenizer):
    assert samples(tokenizer, NUM_TOKENS, 5, seed=3) == drawn[:5]
    assert samples(tokenizer, NUM_TOKENS, 5, seed=4) != drawn[:5]


def test_the_span_of_a_question_contains_its_answer(drawn, tokenizer):
    questions = [(sample, question) for sample in drawn for question in sample.questions]
    assert len(questions) > len(KINDS) / 2
    for sample, question in questions:
        start, end = question.span
        assert tokenizer.decode(question.answer) == tokenizer.decode(sample.token_ids[start:end])
        assert len(question.answer) >= 2
        asked = tokenizer.decode(question.question)
        assert asked.startswith("\n\nQuestion: ")
        # No other place has the answer.
        begun = asked.rpartition("Answer: ")[2]
        if "telephone" not in begun:
            assert tokenizer.decode(sample.token_ids).count(begun) == 1


def test_texts_without_facts_have_no_questions(drawn):
    asked = {sample.kind for sample in drawn if sample.questions}
    assert asked == {"facts", "facts_in_prose", "facts_in_noise", "table"}


def test_texts_to_search_with_are_of_all_kinds_that_have_questions_and_of_several_lengths(tokenizer, drawn):
    of_kinds = [list(of_kind) for of_kind in asked_samples(tokenizer, NUM_TOKENS, 10, 3)]
    assert [{sample.kind for sample in of_kind} for of_kind in of_kinds] == [{kind} for kind in ASKED_KINDS]
    for of_kind in of_kinds:
        assert [len(sample.token_ids) for sample in of_kind] == [NUM_TOKENS * length for length in ASKED_LENGTHS]
        assert all(sample.questions for sample in of_kind)
    measured = {tuple(sample.token_ids) for sample in drawn}
    again = [list(of_kind) for of_kind in asked_samples(tokenizer, NUM_TOKENS, 4, 4)]
    texts = [tuple(sample.token_ids[:NUM_TOKENS]) for of_kind in (*of_kinds, *again) for sample in of_kind]
    assert len({*texts, *measured}) == len(texts) + len(measured)


def test_texts_of_the_evaluation_are_not_read(drawn, tokenizer):
    asked = [question.question for sample in drawn for question in sample.questions]
    text = " ".join(tokenizer.decode(ids) for ids in [*(sample.token_ids for sample in drawn), *asked])
    for of_a_task in ("pass key", "special magic", "San Francisco", "The grass is green", "Remember it"):
        assert of_a_task not in text
    evaluated = {line for name in SAMPLES for line in read_text(name).splitlines() if len(line) > 20}
    assert not evaluated & {line for name in NOVELS for line in _novel(name).splitlines()}


def test_half_of_the_prose_is_the_users(tokenizer):
    own = "Zebras graze quietly. " * 400
    drawn = [s for s in samples(tokenizer, NUM_TOKENS, 2 * len(KINDS), own_texts=[own]) if "prose" in s.kind]
    with_own = [s for s in drawn if "Zebras" in tokenizer.decode(s.token_ids)]
    assert len(drawn) / 4 < len(with_own) < len(drawn) * 3 / 4


def test_a_text_too_short_for_facts_is_refused(tokenizer):
    with pytest.raises(ValueError, match="num_tokens must be at least 128, got 100"):
        samples(tokenizer, 100)
