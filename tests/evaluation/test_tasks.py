"""Prompts of tasks, scores of answers, the texts of prompts, and variants."""

import random
import re
from collections import Counter
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

from vllm_l2kv import ParamError
from vllm_l2kv.tools.evaluation.cases import Answer
from vllm_l2kv.tools.evaluation.tasks import chat, copying, needle, passkey, perplexity, ruler
from vllm_l2kv.tools.evaluation.texts import SAMPLES, encode, largest, num_shared, read_text
from vllm_l2kv.tools.evaluation.variants import BASELINE, CONTROLS, variants

ESSAYS = read_text("state_of_the_union")
LENGTH = 1024
DEPTHS = (0, 0.25, 0.5, 0.75, 1)
NUM_EXPECTED = dict(zip(ruler.TASKS, (1, 1, 1, 1, 1, 1, 4, 4, 5, 10, 3), strict=True))
"""Words to find, as in RULER."""


class Words:
    """A tokenizer without special tokens, with one token for each word."""

    bos_token_id = None

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def said(text: str) -> Answer:
    return Answer(text, (), ())


def depth_of(hidden: str, text: str) -> float:
    return text.index(hidden) / (len(text) - len(hidden))


class TestTexts:
    @pytest.mark.parametrize("high", [0, 1, 2, 7, 8, 100, 1000])
    def test_largest_is_found_in_few_calls(self, high):
        for threshold in range(high + 3):
            calls: list[int] = []

            def fits(n: int, threshold: int = threshold, calls: list[int] = calls) -> bool:
                calls.append(n)
                return n <= threshold

            assert largest(high, fits) == min(threshold, high)
            assert all(0 < n <= min(high, 2 * threshold + 1) for n in calls)
            assert len(calls) <= 2 * threshold.bit_length() + 1

    def test_bos_is_first(self, tokenizer):
        token_ids = encode(tokenizer, "Call me Ishmael.")
        assert token_ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(token_ids[1:]) == "Call me Ishmael."
        assert encode(Words(), "Call me Ishmael.") == [4, 2, 8]

    @pytest.mark.parametrize("name", SAMPLES)
    def test_samples_are_long_and_pure(self, tokenizer, name):
        text = read_text(name)
        assert len(encode(tokenizer, text)) > 60_000
        assert all(character.isprintable() or character == "\n" for character in text)
        assert not re.search(r"[<>{}|\\\ufffd]|  |http|Gutenberg", text)

    def test_files_are_read(self, tmp_path):
        path = tmp_path / "text"
        path.write_text("Straße", encoding="utf-8")
        assert read_text(str(path)) == "Straße"


class TestPerplexity:
    TEXT = read_text("moby_dick")[:20_000]

    def test_pieces_are_consecutive_and_spread_to_the_end(self, tokenizer):
        bos, *body = encode(tokenizer, self.TEXT)
        cases = list(perplexity.cases(tokenizer, self.TEXT, [300], 4, num_continued=20))
        starts = []
        for case in cases:
            assert case.prompt[0] == bos
            assert (len(case.prompt), len(case.forced), case.num_tokens) == (300, 21, 21)
            piece = [*case.prompt[1:], *case.forced]
            starts.append(next(i for i in range(len(body)) if body[i : i + len(piece)] == piece))
        steps = [second - first for first, second in pairwise(starts)]
        assert (starts[0], starts[-1]) == (0, len(body) - 320)
        assert max(steps) - min(steps) <= 1
        assert [case.about for case in cases] == [{"length": 300, "sample": sample} for sample in range(4)]

    def test_a_short_text_is_refused(self, tokenizer):
        length = len(encode(tokenizer, self.TEXT)) - 21
        assert len(list(perplexity.cases(tokenizer, self.TEXT, [length], 1, num_continued=20))) == 1
        with pytest.raises(ValueError, match=f"at least {length + 21} tokens .* got {length + 20};"):
            list(perplexity.cases(tokenizer, self.TEXT, [length + 1], 1, num_continued=20))

    def test_the_first_token_is_left_out(self):
        scores = perplexity.score(Answer("", (9.0, 1.0, 2.5), (True, False, True)))
        assert scores == {"loss": 1.75, "accuracy": 0.5, "losses": [1.0, 2.5], "hits": [0, 1]}


class TestPasskey:
    def cases(self, tokenizer, seed=0):
        return list(passkey.cases(tokenizer, [300, LENGTH], DEPTHS, 2, seed))

    def test_keys_are_hidden(self, tokenizer):
        for case in self.cases(tokenizer):
            length, text = case.about["length"], tokenizer.decode(case.prompt[1:])
            assert 0.85 * length < len(case.prompt) <= length
            hidden = re.search(r"The pass key is (\d+)\. Remember it\. (\d+) is the pass key\.", text)
            assert case.score(said(hidden[1]))["score"] == case.score(said(hidden[2]))["score"] == 1
            noise = text.removeprefix(passkey.TASK).removesuffix(passkey.QUESTION)
            assert depth_of(hidden[0], noise) == pytest.approx(case.about["depth"], abs=0.1)

    def test_seeds(self, tokenizer):
        prompts = [case.prompt for case in self.cases(tokenizer)]
        assert prompts == [case.prompt for case in self.cases(tokenizer)]
        assert not any(case.prompt in prompts for case in self.cases(tokenizer, seed=1))

    def test_a_length_too_short_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="20"):
            list(passkey.cases(tokenizer, [20], [0.5], 1))

    @pytest.mark.parametrize(
        ("text", "score"), [(" 4817.", 1), ("4817 12", 1), ("12 4817", 0), ("48171", 0), ("481", 0), ("no", 0)]
    )
    def test_only_the_first_number_counts(self, text, score):
        assert passkey.score(4817, said(text)) == {"score": score, "answer": text}


class TestNeedle:
    def cases(self, tokenizer, seed=0):
        return list(needle.cases(tokenizer, ESSAYS, [LENGTH], DEPTHS, 2, seed))

    def test_needles_are_hidden(self, tokenizer):
        for case in self.cases(tokenizer):
            text = tokenizer.decode(case.prompt[1:])
            assert 0.85 * LENGTH < len(case.prompt) <= LENGTH
            haystack = text.removeprefix(needle.BEFORE).removesuffix(needle.AFTER)
            assert len(haystack) == len(text) - len(needle.BEFORE) - len(needle.AFTER)
            assert depth_of(needle.NEEDLE, haystack) == pytest.approx(case.about["depth"], abs=0.15)
            before, behind = haystack.split(needle.NEEDLE)
            assert f"{before}{behind.lstrip()}".strip() in " ".join(ESSAYS.split())

    def test_seeds(self, tokenizer):
        prompts = [case.prompt for case in self.cases(tokenizer)]
        assert prompts == [case.prompt for case in self.cases(tokenizer)]
        assert not any(case.prompt in prompts for case in self.cases(tokenizer, seed=1))

    def test_a_short_text_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="too short for a haystack of 1024 tokens"):
            list(needle.cases(tokenizer, ESSAYS[:2000], [LENGTH], [0.5], 1))

    def test_a_length_too_short_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="40"):
            list(needle.cases(tokenizer, ESSAYS, [40], [0.5], 1))

    @pytest.mark.parametrize(
        ("text", "score", "exact"),
        [
            (f" You\n{needle.ANSWER} Yes.", 1, 1),
            (needle.ANSWER.upper().rstrip("."), 10 / 11, 1),
            ("Sit in Dolores Park.", 3 / 11, 0),
            ("Nothing.", 0, 0),
        ],
    )
    def test_scores(self, text, score, exact):
        scores = needle.score(said(text))
        assert (scores["score"], scores["exact"]) == (pytest.approx(score), exact)


class TestRuler:
    @pytest.fixture(scope="class")
    def cases(self, tokenizer):
        return list(ruler.cases(tokenizer, ESSAYS, [LENGTH], ruler.TASKS, 2))

    def test_prompts_hold_what_is_expected(self, tokenizer, cases):
        for case in cases:
            task, text, (expected,) = case.about["subtask"], tokenizer.decode(case.prompt[1:]), case.score.args
            assert 0.85 * LENGTH < len(case.prompt) + case.num_tokens <= LENGTH
            assert len(set(expected)) == len(expected) == NUM_EXPECTED[task]
            assert all(word in text for word in expected)

    def test_queries_name_the_keys(self, tokenizer, cases):
        for case in cases:
            if case.about["subtask"] not in ruler.NEEDLES:
                continue
            text, (expected,) = tokenizer.decode(case.prompt), case.score.args
            needles = re.findall(r"One of the special magic \w+ for (.+?) is: (\S+)\.", text)
            question, start = re.findall(r"special magic \w+ for (.+?) mentioned in the provided text", text)
            assert question == start
            queries = re.split(", and |, ", question)
            # Other needles have none of these keys.
            assert sorted(value for key, value in needles if key in queries) == sorted(expected)

    @pytest.mark.parametrize(
        ("task", "num_needles", "num_keys"),
        [("niah_single_1", 1, 1), ("niah_multikey_1", 4, 4), ("niah_multivalue", 4, 1), ("niah_multiquery", 4, 4)],
    )
    def test_needles_beside_the_essay(self, tokenizer, cases, task, num_needles, num_keys):
        text = next(tokenizer.decode(case.prompt) for case in cases if case.about["subtask"] == task)
        keys = re.findall(r"One of the special magic numbers for (.+?) is:", text)
        assert (len(keys), len(set(keys))) == (num_needles, num_keys)

    def test_variables_are_one_chain(self, tokenizer, cases):
        for case in cases:
            if case.about["subtask"] == "vt":
                text, (names,) = tokenizer.decode(case.prompt), case.score.args
                value = re.search(r"assigned the value (\d+) in the text", text)[1]
                assert f"VAR {names[0]} = {value}" in text
                assert all(f"VAR {name} = VAR {before}" in text for before, name in pairwise(names))

    @pytest.mark.parametrize("length", [160, 220, 300, LENGTH])
    def test_the_most_frequent_coded_words_are_expected(self, tokenizer, length):
        # If the words are too few to decide, it may be refused.
        with suppress(ValueError):
            (case,) = ruler.cases(tokenizer, ESSAYS, [length], ["fwe"], 1)
            coded = tokenizer.decode(case.prompt).split("coded words. ")[1].split("\nQuestion")[0].split()
            counts = Counter(word for word in coded if word != "...")
            expected = [counts.pop(word, 0) for word in case.score.args[0]]
            assert min(expected) > max(counts.values(), default=0)

    def test_the_most_common_listed_words_are_expected(self, tokenizer, cases):
        for case in cases:
            if case.about["subtask"] == "cwe":
                listed = tokenizer.decode(case.prompt).split("\nBelow is")[1].split("\nQuestion")[0]
                counts = Counter(re.findall(r"\d+\. (\S+)", listed))
                expected = [counts.pop(word) for word in case.score.args[0]]
                assert min(expected) > max(counts.values())

    def test_seeds(self, tokenizer, cases):
        again = list(ruler.cases(tokenizer, ESSAYS, [LENGTH], ruler.TASKS, 2))
        assert [(case.prompt, case.score.args) for case in again] == [(case.prompt, case.score.args) for case in cases]
        prompts = [case.prompt for case in cases]
        others = ruler.cases(tokenizer, ESSAYS, [LENGTH], ruler.TASKS, 1, seed=1)
        assert not any(case.prompt in prompts for case in others)

    def test_global_random_generators_are_not_changed(self, tokenizer):
        def state():
            return (
                random.getstate(),
                np.random.get_state(legacy=False)["state"]["key"].tolist(),
                np.random.get_state()[2],
            )

        before = state()
        assert len(list(ruler.cases(tokenizer, ESSAYS, [LENGTH], ruler.TASKS, 1))) == len(ruler.TASKS)
        assert state() == before

    @pytest.mark.parametrize("task", ruler.TASKS)
    def test_a_length_too_short_is_refused(self, tokenizer, task):
        with pytest.raises(ValueError, match=f"{task} does not fit into 140 tokens"):
            list(ruler.cases(tokenizer, ESSAYS, [140], [task], 1))

    def test_a_short_text_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="too short"):
            list(ruler.cases(tokenizer, ESSAYS[:2000], [LENGTH], ["niah_single_2"], 1))

    def test_the_harness_has_words_for_long_lists(self):
        (case,) = ruler.cases(Words(), ESSAYS, [32_768], ["cwe"], 1)
        assert len(case.prompt) <= 32_768

    @pytest.mark.parametrize(("text", "score"), [("Ab, CD", 1), ("ab\x01", 0.5), ("a b", 0)])
    def test_scores_are_those_of_the_harness(self, text, score):
        assert ruler.score(["ab", "cd"], said(text)) == {"score": score, "answer": text}
        assert string_match_all(postprocess_pred([text]), [["ab", "cd"]]) == score


class TestCopying:
    ITEMS = ("cat", "house", "rose")
    RIGHT = " cat\n2. house\n3. rose\n"

    def cases(self, tokenizer, seed=0):
        return list(copying.cases(tokenizer, [100, LENGTH], 2, seed))

    def test_a_list_and_the_beginning_of_its_copy(self, tokenizer):
        for case in self.cases(tokenizer):
            length, (items,) = case.about["length"], case.score.args
            assert 0.9 * length < len(case.prompt) + case.num_tokens <= length
            assert len(set(items)) == len(items) == case.about["items"] > length / 20
            text = tokenizer.decode(case.prompt[1:])
            before, after = text.split("The same list again:\n")
            assert before == f"List:\n{copying.lines(items)}\n\n"
            assert after == "1."

    def test_the_right_answer_fits_and_is_right(self, tokenizer):
        """Followed by another line, so that its last word is complete."""
        for case in self.cases(tokenizer):
            (items,) = case.score.args
            right = copying.lines(items).removeprefix("1.")
            assert len(encode(tokenizer, f"{right}\n")) - 1 < case.num_tokens
            assert case.score(said(right)) == {"score": 1, "answer": right}
            assert case.score(said(right.replace(items[-1], items[-1] + "s")))["score"] == 1 - 1 / len(items)

    @pytest.mark.parametrize(
        ("text", "num_right"),
        [
            (RIGHT, 3),
            (RIGHT + "4. cat\n", 3),
            (RIGHT.replace("\n", "  \n"), 3),
            (" cat\n2. house", 2),
            (" cat\n2. houses\n3. rose", 2),
            (" cat\n2. House\n3. rose", 2),
            (" cat\n3. rose\n2. house", 1),
            (" cat\n3. rose", 1),
            (" house\n2. rose", 0),
            ("cat\n2. house\n3. rose", 2),
            (" cat, house, rose", 0),
            ("", 0),
        ],
    )
    def test_items_count_in_the_line_of_their_number(self, text, num_right):
        assert copying.score(self.ITEMS, said(text)) == {"score": num_right / 3, "answer": text}

    def test_seeds(self, tokenizer):
        prompts = [case.prompt for case in self.cases(tokenizer)]
        assert prompts == [case.prompt for case in self.cases(tokenizer)]
        assert not any(case.prompt in prompts for case in self.cases(tokenizer, seed=1))
        # Lengths use independent random numbers.
        assert [case.prompt for case in copying.cases(tokenizer, [LENGTH], 2)] == prompts[2:]

    def test_lists_of_a_thousand_items(self, tokenizer):
        (case,) = copying.cases(tokenizer, [13_500], 1)
        assert case.about["items"] >= 1000

    def test_a_length_too_short_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="do not fit into 20 tokens"):
            list(copying.cases(tokenizer, [20], 1))


class TestChat:
    TEXT = read_text("moby_dick")

    def cases(self, tokenizer, seed=0):
        return list(chat.cases(tokenizer, self.TEXT, [512, LENGTH], 2, seed))

    def test_facts_are_stated_and_asked_about(self, tokenizer):
        cases = self.cases(tokenizer)
        assert [case.about["turn"] for case in cases] == list(range(chat.NUM_FACTS)) * 4
        for case in cases:
            text, (value,) = tokenizer.decode(case.prompt), case.score.args
            *turns, question, begun = text.split("<|im_start|>")[2:]
            (fact,) = [fact for fact in chat.FACTS if f"user\n{fact.statement.format(value)}<|im_end|>\n" in turns]
            assert question == f"user\n{fact.question}<|im_end|>\n"
            assert begun == f"assistant\n{fact.begun}"
            assert len(turns) % 2 == 0

    def test_earlier_answers_are_right_and_in_the_history(self, tokenizer):
        first, *_, last = self.cases(tokenizer)[: chat.NUM_FACTS]
        answered = tokenizer.decode(first.prompt) + f" {first.score.args[0]}.<|im_end|>"
        assert tokenizer.decode(last.prompt).startswith(answered)
        assert 0.85 * 512 < len(last.prompt) <= 512

    def test_a_tokenizer_without_a_chat_template(self, tokenizer, monkeypatch):
        monkeypatch.setattr(tokenizer, "chat_template", None)
        *_, case = chat.cases(tokenizer, self.TEXT, [512], 1)
        turns = tokenizer.decode(case.prompt[1:]).split("\n\n")
        assert case.prompt[0] == tokenizer.bos_token_id != case.prompt[1]
        assert turns[0].startswith("User: ")
        assert turns[1] == f"Assistant: {chat.NOTED}"
        assert turns[-1].startswith("Assistant: ")

    @pytest.mark.parametrize(
        ("text", "score"), [(" Oslo.", 1), (" OSLO, I think", 1), (" Os lo", 0), (" Oslover", 0), ("", 0)]
    )
    def test_the_value_counts_as_a_word(self, text, score):
        assert chat.score("Oslo", said(text)) == {"score": score, "answer": text}

    def test_seeds(self, tokenizer):
        prompts = [case.prompt for case in self.cases(tokenizer)]
        assert prompts == [case.prompt for case in self.cases(tokenizer)]
        assert not any(case.prompt in prompts for case in self.cases(tokenizer, seed=1))

    def test_short_texts_and_lengths_are_refused(self, tokenizer):
        with pytest.raises(ValueError, match="too short for a conversation of 1024 tokens"):
            list(chat.cases(tokenizer, self.TEXT[:2000], [LENGTH], 1))
        with pytest.raises(ValueError, match="does not fit into 100 tokens"):
            list(chat.cases(tokenizer, self.TEXT, [100], 1))


def test_documents_end_where_questions_begin(tokenizer):
    """The part after the document asks about it and does not contain the answer."""
    asked = {
        "needle": (needle.cases(tokenizer, ESSAYS, [LENGTH], [0.5], 1), needle.AFTER),
        "passkey": (passkey.cases(tokenizer, [LENGTH], [0.5], 1), passkey.QUESTION),
        "copy": (copying.cases(tokenizer, [LENGTH], 1), copying.AFTER + copying.BEGUN),
    }
    for cases, question in asked.values():
        for case in cases:
            assert tokenizer.decode(case.prompt[case.num_document_tokens :]) == question
    for case in ruler.cases(tokenizer, ESSAYS, [LENGTH], ruler.TASKS, 1):
        question = tokenizer.decode(case.prompt[case.num_document_tokens :])
        document = tokenizer.decode(case.prompt[: case.num_document_tokens])
        assert re.match(r"\n(What (is|are all) the special magic|Question: )", question)
        assert all(word in document for word in case.score.args[0][1:])
    for case in chat.cases(tokenizer, ESSAYS, [LENGTH], 1):
        turns = tokenizer.decode(case.prompt[case.num_document_tokens :]).split("<|im_start|>")
        assert [turn.split("\n")[0] for turn in turns] == ["", "user", "assistant"]
    for case in perplexity.cases(tokenizer, ESSAYS, [LENGTH], 1):
        assert case.num_document_tokens == LENGTH - 1


@pytest.mark.parametrize(("first", "second", "num"), [([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3], 1), ([], [1], 0)])
def test_tokens_that_two_lists_begin_with(first, second, num):
    assert num_shared(first, second) == num_shared(second, first) == num


class TestVariants:
    def test_budgets_beside_ratios(self):
        found = variants(["l2", "keydiff"], [0.5], [(0, 0), (4, 64)], budgets=[96, 80])
        budgets = [variant for variant in found if variant.max_tokens is not None]
        assert [variant for variant in found if variant.max_tokens is None] == variants(
            ["l2", "keydiff"], [0.5], [(0, 0), (4, 64)]
        )
        assert {variant.keep_ratio for variant in budgets} == {1}
        # `random` depends on indices of rows in the prompt, so it has no budgets.
        assert {variant.scorer for variant in budgets} == {"l2", "keydiff", "l2_high", "first_last"}
        assert len(set(budgets)) == len(budgets) == 2 * 4 * 2

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ({"budgets": [67]}, "kv_max_tokens"),
            ({"budgets": [96], "scorers": ["random"]}, "kv_scorer"),
            ({"budgets": [96], "granularities": ["block"]}, "kv_granularity"),
        ],
    )
    def test_what_a_budget_excludes_is_refused(self, words, said):
        with pytest.raises(ParamError) as refused:
            variants(**{"scorers": ["l2"], "ratios": [], **words})
        assert refused.value.param == said

    def test_controls_are_there_once_token_by_token(self):
        found = variants(["l2", "random"], [0.5, 0.25], [(0, 0), (4, 64)], ["token", "block"])
        assert found[0] == BASELINE
        assert BASELINE.keep_ratio == 1
        assert len(set(found)) == len(found) == 1 + 2 * 2 * (2 * 2 + 2)
        # Random blocks were requested.
        for control in CONTROLS:
            tokens = [variant for variant in found if (variant.scorer, variant.granularity) == (control, "token")]
            assert [(variant.protect_first, variant.protect_last, variant.keep_ratio) for variant in tokens] == [
                (0, 0, 0.5),
                (0, 0, 0.25),
                (4, 64, 0.5),
                (4, 64, 0.25),
            ]
        by_block = {variant.scorer for variant in found if variant.granularity == "block"}
        assert by_block == {"l2", "random"}

    def test_blocks_alone(self):
        kinds = [(variant.scorer, variant.granularity) for variant in variants(["l2"], [0.5], granularities=["block"])]
        assert kinds == [("l2", "token"), ("l2", "block"), *((control, "token") for control in CONTROLS)]

    @pytest.mark.parametrize(("scorers", "ratios"), [(["l2"], [0.5, 0.5]), (["l2", "l2"], [0.5]), (["l2"], [1.0, 0.5])])
    def test_no_duplicates(self, scorers, ratios):
        found = variants(scorers, ratios)
        assert len(set(found)) == len(found)
