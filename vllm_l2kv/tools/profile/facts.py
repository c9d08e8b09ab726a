"""Generated facts, each with a question, in templates that no task of `vllm-l2kv eval` uses."""

import random
import re
import string
import uuid
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

MONTHS = ("January", "March", "April", "June", "July", "September", "October", "December")


class Fact(NamedTuple):
    """A statement with a value that cannot be guessed.

    Attributes:
        before: The statement up to the value.
        value: The value, which the question asks for.
        after: The rest of the statement.
        question: The question and the answer up to the value.
    """

    before: str
    value: str
    after: str
    question: str

    def __str__(self) -> str:
        return f"{self.before} {self.value}{self.after}"


class Facts:
    """Draws random facts.

    Args:
        chance: Random generator.
        texts: Prose from which words and names are taken.
    """

    def __init__(self, chance: random.Random, texts: tuple[str, ...]) -> None:
        self.chance = chance
        self.words, self.names = _vocabulary(texts)

    def sentence(self) -> Fact:
        """A fact as a sentence."""
        return self.chance.choice(
            (self._room, self._telephone, self._finest, self._record, self._order, self._serial)
        )()

    def row(self) -> Iterator[Fact]:
        """Rows of a table, all of one kind."""
        kind = self.chance.choice((self._json, self._commas, self._tabs, self._setting, self._item))
        while True:
            yield kind()

    def word(self) -> str:
        """A word from the prose."""
        return self.chance.choice(self.words)

    def name(self) -> str:
        """A name from the prose, such as that of a person or a place."""
        return self.chance.choice(self.names)

    def number(self) -> str:
        """Four to eight digits."""
        return str(self.chance.randrange(10**3, 10 ** self.chance.randrange(4, 9)))

    def code(self) -> str:
        """A value that can only be copied: digits, letters, a UUID, words or a date."""
        chance = self.chance
        kind = chance.randrange(6)
        if kind == 0:
            return self.number()
        if kind == 1:
            return str(uuid.UUID(int=chance.getrandbits(128), version=4))
        if kind == 2:
            return "".join(chance.choices(string.ascii_uppercase + string.digits, k=chance.randrange(5, 12)))
        if kind == 3:
            return f"{self.word()}-{self.word()}"
        if kind == 4:
            return f"{self.word()} {self.word()} {self.word()}"
        return f"{chance.randrange(1, 29)} {chance.choice(MONTHS)} {chance.randrange(1800, 2030)}"

    def _room(self) -> Fact:
        begun = f"The access code of the {self.word()} room is"
        return Fact(begun, self.code(), "; keep it safe.", _asked("Which access code was noted?", begun))

    def _telephone(self) -> Fact:
        name = f"{self.name()} {self.name()}"
        asked = _asked(f"Under which number can {name} be reached?", f"{name} can be reached by telephone under")
        return Fact(f"{name} lives in {self.name()} and can be reached by telephone under", self.number(), ".", asked)

    def _finest(self) -> Fact:
        begun = f"According to {self.name()}, the finest {self.word()} comes with"
        value = f"{self.word()} {self.word()} and {self.word()} {self.word()}"
        return Fact(begun, value, ".", _asked("What does it come with?", begun))

    def _record(self) -> Fact:
        begun = f"The {self.word()} of {self.name()} was recorded as"
        return Fact(begun, self.code(), ".", _asked("What was recorded?", begun))

    def _order(self) -> Fact:
        begun = f"Order {self.number()} contains"
        value = f"{self.chance.randrange(2, 90)} {self.word()}s for {self.name()} {self.name()}"
        return Fact(begun, value, ".", _asked("What does the order contain?", begun))

    def _serial(self) -> Fact:
        begun = f"The {self.word()} with serial {self.number()} belongs to"
        value = f"{self.name()} {self.name()} of {self.name()}"
        return Fact(begun, value, ".", _asked("To whom does it belong?", begun))

    def _json(self) -> Fact:
        begun = f'"{self.word()}_{self.word()}":'
        return Fact(begun, f'"{self.code()}"', ",", _asked("Which value has this key?", begun))

    def _commas(self) -> Fact:
        begun = f"{self.name()} {self.name()}, {self.word()},"
        return Fact(begun, f"{self.number()}, {self.code()}", "", _asked("How does this row go on?", begun))

    def _tabs(self) -> Fact:
        begun = f"{self.number()}\t{self.word()}\t"
        return Fact(begun, f"{self.code()}", "", _asked("How does this row go on?", begun))

    def _setting(self) -> Fact:
        begun = f"{self.word().upper()}_{self.word().upper()} ="
        return Fact(begun, self.code(), "", _asked("What is this set to?", begun))

    def _item(self) -> Fact:
        begun = f"- {self.word()} {self.word()}:"
        return Fact(begun, self.code(), "", _asked("What does the list say?", begun))


@cache
def _vocabulary(texts: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Words and names of texts. Cached, since searching a novel takes longer than generating a text."""
    patterns = r"\b[a-z]{4,10}\b", r"(?<=[a-z] )[A-Z][a-z]{3,9}\b"
    words, names = (sorted({word for text in texts for word in re.findall(pattern, text)}) for pattern in patterns)
    return words, names


def _asked(question: str, begun: str) -> str:
    return f"\n\nQuestion: {question}\nAnswer: {begun}"
