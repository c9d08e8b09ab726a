"""Calibration texts of a profile, and questions about facts in them. `vllm-l2kv eval` uses none of them.

Prose is bundled, documentation and code are those of the installed Python, and facts and tables are generated. Without
facts and tables, a scorer that is trained on the texts evicts numbers; this was measured, with these shares of the
kinds.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from vllm_l2kv.tools.evaluation.tasks.needle import sentences_of
from vllm_l2kv.tools.evaluation.texts import encode
from vllm_l2kv.tools.profile.facts import Fact, Facts

NOVELS = ("pride_and_prejudice", "sherlock_holmes")
MODULES = (
    *("argparse", "ast", "asyncio.base_events", "calendar", "configparser", "csv", "difflib", "doctest", "fractions"),
    *(
        "ftplib",
        "heapq",
        "http.client",
        "inspect",
        "ipaddress",
        "json.decoder",
        "logging",
        "mailbox",
        "optparse",
        "pdb",
    ),
    *("pickle", "shutil", "smtplib", "statistics", "tarfile", "textwrap", "tokenize"),
)
"""Modules of Python that are read as code."""
NOISE = (
    "It rained.",
    "Nobody came.",
    "The door was shut.",
    "Time went by.",
    "We walked on.",
    "All was quiet.",
    "Birds sang.",
    "Leaves fell.",
    "Water ran down the wall.",
)
KINDS = (
    *("facts_in_prose", "prose", "table", "documentation", "facts_in_prose", "code", "facts", "prose"),
    *("facts_in_noise", "facts_in_prose", "documentation", "prose", "table", "facts_in_prose", "code", "words"),
    *("prose", "facts_in_prose", "facts", "documentation", "facts_in_noise", "prose", "facts_in_prose", "assignments"),
)
"""Kinds of texts, in a cycle."""
ASKED_KINDS = ("facts_in_prose", "facts_in_noise", "facts", "table")
"""Kinds of texts with questions."""
ASKED_LENGTHS = (1, 1, 2)
"""Relative lengths of texts for the search, in a cycle: a setting for short texts may fail on longer ones."""
NUM_QUESTIONS = 2
"""Most questions about a text."""
MIN_TOKENS = 128
PROTECTED = 4
"""First tokens of a text about which no question is asked, since every compaction keeps them."""


class Question(NamedTuple):
    """A question about a fact of a text.

    Attributes:
        question: Token ids of the question and the start of the answer, which follow the text.
        answer: Token ids of the rest of the answer, two or more.
        span: Range of the text's tokens that state the answer: first and end, accurate to about one token.
    """

    question: list[int]
    answer: list[int]
    span: tuple[int, int]


class Sample(NamedTuple):
    """A text.

    Attributes:
        kind: One of `KINDS`.
        token_ids: Token ids, beginning with the tokenizer's BOS if it has one.
        questions: Questions about the text; empty if it has no facts.
    """

    kind: str
    token_ids: list[int]
    questions: list[Question]


def samples(
    tokenizer: Any, num_tokens: int = 1536, num: int = 112, seed: int = 0, own_texts: Sequence[str] = ()
) -> list[Sample]:
    """Texts of all kinds, the same for the same arguments and version of Python.

    Args:
        tokenizer: The model's tokenizer.
        num_tokens: Length of each text.
        num: Number of texts; a larger number only adds texts.
        seed: Seed of the texts.
        own_texts: The user's texts, from which half of the prose is drawn.

    Raises:
        ValueError: `num_tokens` is too small for a fact.
    """
    if num_tokens < MIN_TOKENS:
        raise ValueError(f"num_tokens must be at least {MIN_TOKENS}, got {num_tokens}.")
    return [_sample(tokenizer, num_tokens, KINDS[i % len(KINDS)], f"{seed}-{i}", own_texts) for i in range(num)]


def asked_samples(
    tokenizer: Any, num_tokens: int, num: int, seed: int, own_texts: Sequence[str] = ()
) -> list[Iterator[Sample]]:
    """Texts with questions, the same number of each of `ASKED_KINDS`, generated lazily.

    Args:
        tokenizer: The model's tokenizer.
        num_tokens: Length of a text; some are longer, by `ASKED_LENGTHS`.
        num: Number of texts, rounded up to a multiple of the kinds.
        seed: Seed of the texts, which differ from those of `samples`.
        own_texts: See `samples`.

    Returns:
        An iterator over the texts of each kind.
    """

    def of_kind(kind: str) -> Iterator[Sample]:
        for i in range(-(-num // len(ASKED_KINDS))):
            length = num_tokens * ASKED_LENGTHS[i % len(ASKED_LENGTHS)]
            yield _sample(tokenizer, length, kind, f"{seed}-{kind}-{i}", own_texts)

    return [of_kind(kind) for kind in ASKED_KINDS]


def _sample(tokenizer: Any, num_tokens: int, kind: str, key: str, own_texts: Sequence[str]) -> Sample:
    chance = random.Random(key)
    facts = Facts(chance, tuple(_novel(name) for name in NOVELS))
    pieces, between = _pieces(kind, facts, own_texts)
    hidden = {"facts_in_prose": (2, 14), "facts_in_noise": (1, 6)}
    few = [facts.sentence() for _ in range(chance.randrange(*hidden[kind]))] if kind in hidden else []
    taken: list[str | Fact] = []
    missing = num_tokens - sum(len(encode(tokenizer, str(fact))) for fact in few)
    while missing > 0 or not taken:
        taken.append(next(pieces))
        missing -= len(encode(tokenizer, str(taken[-1])))
    for fact in few:
        taken.insert(chance.randrange(len(taken)), fact)
    # Pieces that are tokenized separately have a few more tokens than together.
    while len(token_ids := encode(tokenizer, between.join(map(str, taken)))) < num_tokens:
        taken += [next(pieces) for _ in range(8)]
    return Sample(kind, token_ids[:num_tokens], _questions(tokenizer, num_tokens, taken, between, chance))


def _questions(
    tokenizer: Any, num_tokens: int, pieces: Sequence[str | Fact], between: str, chance: random.Random
) -> list[Question]:
    """Questions about some of the facts in the first `num_tokens` tokens."""
    asked = [piece.question for piece in pieces if isinstance(piece, Fact)]
    places = [i for i, piece in enumerate(pieces) if isinstance(piece, Fact) and asked.count(piece.question) == 1]
    chance.shuffle(places)
    found: list[Question] = []
    for place in places:
        fact = pieces[place]
        assert isinstance(fact, Fact)
        before = between.join([*map(str, pieces[:place]), fact.before])
        span = len(encode(tokenizer, before)), len(encode(tokenizer, f"{before} {fact.value}"))
        question = encode(tokenizer, fact.question)
        # Encoded together, so that the tokenizer decides which token has the space between them.
        answered = encode(tokenizer, f"{fact.question} {fact.value}")
        bos = len(encode(tokenizer, ""))
        answer = answered[len(question) :]
        if span[0] < PROTECTED or span[1] > num_tokens or answered[: len(question)] != question or len(answer) < 2:
            continue
        found.append(Question(question[bos:], answer, span))
        if len(found) == NUM_QUESTIONS:
            break
    return found


def _pieces(kind: str, facts: Facts, own_texts: Sequence[str]) -> tuple[Iterator[str | Fact], str]:
    """An endless iterator over pieces of a text, and the separator between them."""
    chance = facts.chance
    if kind in ("prose", "facts_in_prose"):
        texts = own_texts if own_texts and chance.random() < 0.5 else [_novel(name) for name in NOVELS]
        return _passages(chance, texts, sentences_of), " "
    if kind == "documentation":
        return _passages(chance, _documentation(), str.splitlines), "\n"
    if kind == "code":
        return _passages(chance, _code(), str.splitlines), "\n"
    makers: dict[str, tuple[Callable[[], Iterator[str | Fact]], str]] = {
        "facts": (lambda: iter(facts.sentence, None), chance.choice(" \n")),
        "facts_in_noise": (lambda: _again(" ".join(chance.sample(NOISE, 6))), "\n"),
        "table": (facts.row, "\n"),
        "words": (lambda: _words(chance, facts), chance.choice((" ", ", ", "\n"))),
        "assignments": (lambda: _assignments(facts), "\n"),
    }
    make, between = makers[kind]
    return make(), between


def _passages(chance: random.Random, texts: Sequence[str], cut: Callable[[str], list[str]]) -> Iterator[str]:
    """Consecutive pieces from a random place in a text, then from a random place in another text, and so on."""
    while True:
        pieces = cut(chance.choice(texts))
        yield from pieces[chance.randrange(max(len(pieces) * 3 // 4, 1)) :]


def _again(piece: str) -> Iterator[str]:
    while True:
        yield piece


def _words(chance: random.Random, facts: Facts) -> Iterator[str]:
    """Words or names, most of them repeated many times."""
    drawn = chance.choice((facts.words, facts.names))
    common = chance.sample(drawn, 60)
    while True:
        yield chance.choice(common if chance.random() < 0.6 else drawn)


def _assignments(facts: Facts) -> Iterator[str]:
    """Assignments of numbers to variables, and of variables to each other."""
    names = [facts.word()[:4]]
    while True:
        value = facts.chance.choice((facts.number(), facts.chance.choice(names)))
        names.append(facts.word()[:4] + str(len(names)))
        yield f"{names[-1]} := {value};"


@cache
def _novel(name: str) -> str:
    return files("vllm_l2kv.tools.profile").joinpath("texts", f"{name}.txt").read_text(encoding="utf-8")


@cache
def _documentation() -> list[str]:
    """Pages of the manual that the installed Python includes."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items()) if len(text) > 3000]


@cache
def _code() -> list[str]:
    return [
        Path(spec.origin).read_text(encoding="utf-8") for name in MODULES if (spec := find_spec(name)) and spec.origin
    ]
