"""A conversation whose first turns state facts that its last turns ask for.

The turns between them do not mention the facts. Each question is a separate prompt, as a server would get it: the whole
conversation so far, with the right answers to earlier questions. The prompt includes the start of the answer, so that
small models give the value next. Conversations use the model's chat template, or a plain one if it has none.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from vllm_l2kv.tools.evaluation.cases import Answer, Case
from vllm_l2kv.tools.evaluation.tasks.needle import sentences_of
from vllm_l2kv.tools.evaluation.texts import encode, largest, num_shared

Messages = list[dict[str, str]]


class Fact(NamedTuple):
    """A fact that the user may state.

    Attributes:
        statement: The statement, with `{}` for the value.
        question: The question about it.
        begun: The answer up to the value.
        values: Possible values.
    """

    statement: str
    question: str
    begun: str
    values: Sequence[str]


NUMBERS = [str(number) for number in range(1013, 10_000, 97)]
PETS = ("Biscuit", "Pepper", "Shadow", "Marble", "Ginger", "Pumpkin", "Rocket", "Cocoa", "Noodle", "Domino")
PLACES = ("flowerpot", "doormat", "bench", "woodpile", "bucket", "stone", "barrel", "ladder", "statue", "birdhouse")
TOWNS = ("Lisbon", "Oslo", "Vienna", "Cairo", "Toronto", "Dublin", "Prague", "Seoul", "Athens", "Boston")
DOCTORS = ("Miller", "Novak", "Tanaka", "Rossi", "Keller", "Dubois", "Larsen", "Ortega", "Murphy", "Schmidt")
TEACHERS = ("Walker", "Santos", "Becker", "Conti", "Nakamura", "Jensen", "Moreau", "Fischer", "Quinn", "Herrera")
FACTS = (
    Fact("My dog is called {}.", "What is my dog called?", "Your dog is called", PETS),
    Fact("I hid the spare key under the {}.", "Where is the spare key?", "You hid the spare key under the", PLACES),
    Fact("My sister lives in {}.", "Where does my sister live?", "Your sister lives in", TOWNS),
    Fact("My dentist is Doctor {}.", "Who is my dentist?", "Your dentist is Doctor", DOCTORS),
    Fact("My piano teacher is Mrs. {}.", "Who is my piano teacher?", "Your piano teacher is Mrs.", TEACHERS),
    Fact("My locker has the number {}.", "Which number has my locker?", "Your locker has the number", NUMBERS),
    Fact("My bus ticket costs {} cents.", "What does my bus ticket cost?", "Your bus ticket costs", NUMBERS),
    Fact("My flight has the number {}.", "Which number has my flight?", "Your flight has the number", NUMBERS),
)
NUM_FACTS = 4
"""Facts that each conversation states and asks for."""
NOTED = "Thank you, I will remember that."
PASSAGE = "Here is a passage from the book that I am reading. {}"
HEARD = "Thank you for sharing this passage."
NUM_SENTENCES = 4
"""Sentences of a passage."""
NUM_ANSWER_TOKENS = 12
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


def cases(tokenizer: Any, text: str, lengths: Sequence[int], num_samples: int, seed: int = 0) -> Iterator[Case]:
    """`NUM_FACTS` prompts for each length and sample, one for each question.

    Args:
        tokenizer: The model's tokenizer.
        text: Text from which the user quotes passages.
        lengths: Most tokens of a conversation's last prompt.
        num_samples: Conversations for each length.
        seed: Seed of the conversations.

    Raises:
        ValueError: The text or a length is too short.
    """
    sentences = sentences_of(text)
    for length in lengths:
        for sample in range(num_samples):
            chance = random.Random(f"{seed}-chat-{length}-{sample}")
            facts = [(fact, chance.choice(fact.values)) for fact in chance.sample(FACTS, NUM_FACTS)]
            asked = chance.sample(facts, NUM_FACTS)
            passages = sentences[chance.randrange(max(len(sentences) // 2, 1)) :]
            make = partial(_last_prompt, tokenizer, facts, asked, passages)
            num_sentences = largest(min(len(passages), length // 2), lambda n: len(make(n)) <= length)  # noqa: B023
            if num_sentences == 0:
                raise ValueError(f"A conversation does not fit into {length} tokens; give a greater length.")
            if num_sentences == len(passages):
                raise ValueError(f"The text is too short for a conversation of {length} tokens; give a longer one.")
            messages = opening(facts, passages[:num_sentences])
            for turn, (fact, value) in enumerate(asked):
                prompt = _encoded(tokenizer, [*messages, _said("user", fact.question)], fact.begun)
                yield Case(
                    prompt=prompt,
                    num_tokens=NUM_ANSWER_TOKENS,
                    score=partial(score, value),
                    about={"length": length, "sample": sample, "turn": turn},
                    num_document_tokens=num_shared(prompt, _encoded(tokenizer, messages)),
                )
                messages += question_and_answer(fact, value)


def opening(facts: Sequence[tuple[Fact, str]], sentences: Sequence[str]) -> Messages:
    """The turns before the first question: the facts, then passages of a book."""
    messages = []
    for fact, value in facts:
        messages += [_said("user", fact.statement.format(value)), _said("assistant", NOTED)]
    for start in range(0, len(sentences), NUM_SENTENCES):
        passage = PASSAGE.format(" ".join(sentences[start : start + NUM_SENTENCES]))
        messages += [_said("user", passage), _said("assistant", HEARD)]
    return messages


def question_and_answer(fact: Fact, value: str) -> Messages:
    """A question and its right answer."""
    return [_said("user", fact.question), _said("assistant", f"{fact.begun} {value}.")]


def score(value: str, answer: Answer) -> Mapping[str, Any]:
    """1 if the value is a word of the answer, else 0."""
    words = re.findall(r"\w+", answer.text.lower())
    return {"score": float(value.lower() in words), "answer": answer.text}


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _last_prompt(
    tokenizer: Any,
    facts: Sequence[tuple[Fact, str]],
    asked: Sequence[tuple[Fact, str]],
    passages: Sequence[str],
    num_sentences: int,
) -> list[int]:
    answered = [message for fact, value in asked[:-1] for message in question_and_answer(fact, value)]
    last = asked[-1][0]
    messages = [*opening(facts, passages[:num_sentences]), *answered, _said("user", last.question)]
    return _encoded(tokenizer, messages, last.begun)


def _encoded(tokenizer: Any, messages: Messages, begun: str = "") -> list[int]:
    """Token ids of a conversation, followed by the start of an answer."""
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    text: str = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=bool(begun)
    )
    # Some templates write the BOS token, which `encode` also adds.
    return encode(tokenizer, text.removeprefix(tokenizer.bos_token or "") + begun)
