"""Task families of RULER that need no download.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", arXiv 2404.06654.
Variable tracking, common words and frequent words use lm-evaluation-harness. Needles are made here, since its module
for them starts a download when it is imported.
"""

import math
import random
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from vllm_l2kv.tools.evaluation.cases import Answer, Case
from vllm_l2kv.tools.evaluation.tasks.needle import sentences_of
from vllm_l2kv.tools.evaluation.tasks.passkey import NOISE
from vllm_l2kv.tools.evaluation.texts import encode, largest, num_shared

Prompt = tuple[str, list[str]]
"""A text, and the words that its answer must have."""

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
QUESTION = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind} afterwards.\n{context}\nWhat {are_all} special magic {kind} for {query} mentioned in the "
    "provided text? The special magic {kind} for {query} mentioned in the provided text {are}"
)


@dataclass(frozen=True)
class Needles:
    """One of RULER's needle tasks.

    Attributes:
        haystack: `noise`, `essay`, or `needles` that no question asks for.
        num_keys: Number of keys.
        num_values: Number of values of each key.
        num_queries: Number of keys that are asked for.
        values: `numbers` or `uuids`.
        keys: `words` or `uuids`.
    """

    haystack: str
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    values: str = "numbers"
    keys: str = "words"


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", values="uuids", keys="uuids"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_keys=4, num_queries=4),
}
TASKS = (*NEEDLES, "vt", "cwe", "fwe")
NUM_ANSWER_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50}
NUM_NEEDLE_TOKENS = 128
NUM_COMMON_WORDS = 10
MIN_CODED_WORDS = 90
"""Fewest coded words; with fewer, the third and the fourth may be equally frequent."""


def cases(
    tokenizer: Any, text: str, lengths: Sequence[int], tasks: Sequence[str], num_samples: int, seed: int = 0
) -> Iterator[Case]:
    """Prompts for each length, task and sample.

    Args:
        tokenizer: The model's tokenizer.
        text: Essays to hide needles in.
        lengths: Most tokens of a prompt with its answer.
        tasks: Names of `TASKS`.
        num_samples: Prompts for each length and task.
        seed: Seed of the prompts.

    Raises:
        ValueError: The text or a length is too short for a task.
    """
    sentences = sentences_of(text)
    for length in lengths:
        for task in tasks:
            num_tokens = NUM_ANSWER_TOKENS.get(task, NUM_NEEDLE_TOKENS)
            for sample in range(num_samples):
                # The seed of the sample, so that it is the same at every size that is tried.
                key = f"{seed}-{task}-{length}-{sample}"
                make = partial(make_prompt, task, key, sentences, tokenizer, length)
                room = length - num_tokens
                most = int(min(length, _most(task, sentences)))
                size = largest(most, lambda n: len(encode(tokenizer, make(n)[0])) <= room)  # noqa: B023
                if size == 0:
                    raise ValueError(f"{task} does not fit into {length} tokens; give a greater length.")
                if size == most < length and task in NEEDLES:
                    raise ValueError(f"The text is too short for {task} with {length} tokens; give a longer one.")
                made, expected = make(size)
                prompt = encode(tokenizer, made)
                # The question is the last line.
                document = encode(tokenizer, made.rpartition("\n")[0])
                yield Case(
                    prompt=prompt,
                    num_tokens=num_tokens,
                    score=partial(score, expected),
                    about={"length": length, "subtask": task, "sample": sample},
                    num_document_tokens=num_shared(prompt, document),
                )


def score(expected: Sequence[str], answer: Answer) -> Mapping[str, Any]:
    """Share of the expected words that the answer has, ignoring case: RULER's `string_match_all`."""
    said = answer.text.lower()
    return {"score": sum(word.lower() in said for word in expected) / len(expected), "answer": answer.text}


def make_prompt(task: str, key: str, sentences: Sequence[str], tokenizer: Any, length: int, size: int) -> Prompt:
    """One prompt, whose length grows with `size`."""
    if task in NEEDLES:
        return needles_prompt(NEEDLES[task], random.Random(key), sentences, size)
    return _from_harness(task, key, tokenizer, length, size)


def needles_prompt(kind: Needles, chance: random.Random, essay: Sequence[str], size: int) -> Prompt:
    """A prompt with needles in `size` pieces of haystack."""
    made: dict[str, Callable[[], str]] = {
        "words": partial(_word, chance),
        "numbers": lambda: str(chance.randrange(10**6, 10**7)),
        "uuids": lambda: str(uuid.UUID(int=chance.getrandbits(128), version=4)),
    }
    values = {made[kind.keys](): [made[kind.values]() for _ in range(kind.num_values)] for _ in range(kind.num_keys)}
    needles = [NEEDLE.format(kind=kind.values, key=key, value=value) for key in values for value in values[key]]
    queries = chance.sample(sorted(values), kind.num_queries)
    start = chance.randrange(max(len(essay) // 2, 1))
    places = [chance.random() for _ in needles]
    chance.shuffle(needles)
    if kind.haystack == "essay":
        pieces, between = list(essay[start : start + size]), " "
    else:
        between = "\n"
        pieces = [
            NOISE
            if kind.haystack == "noise"
            else NEEDLE.format(kind=kind.values, key=made[kind.keys](), value=made[kind.values]())
            for _ in range(size)
        ]
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        pieces.insert(round(place * len(pieces)), needle)
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    many = kind.num_values * kind.num_queries > 1
    prompt = QUESTION.format(
        some="Some" if many else "A",
        kind=kind.values if many else kind.values[:-1],
        are="are" if many else "is",
        are_all="are all the" if many else "is the",
        context=between.join(pieces),
        query=query,
    )
    return prompt, [value for key in queries for value in values[key]]


def _word(chance: random.Random) -> str:
    adjectives, nouns = words()
    return f"{chance.choice(adjectives)}-{chance.choice(nouns)}"


@cache
def words() -> tuple[list[str], list[str]]:
    """English adjectives and nouns, thousands of each, in alphabetical order."""
    import wonderwords

    all_words = wonderwords.RandomWord()
    adjectives, nouns = (sorted(all_words.filter(include_categories=[kind])) for kind in ("adjective", "noun"))
    return adjectives, nouns


def _most(task: str, sentences: Sequence[str]) -> float:
    """The largest possible size of a prompt."""
    if task == "cwe":
        from lm_eval.tasks.ruler import cwe_utils

        return len(cwe_utils.WORDS) - NUM_COMMON_WORDS
    if task in NEEDLES and NEEDLES[task].haystack == "essay":
        return len(sentences) // 2  # essays start in the first half of the text
    return math.inf


def _from_harness(task: str, key: str, tokenizer: Any, length: int, size: int) -> Prompt:
    """A prompt of lm-evaluation-harness; `size` counts pieces of noise, words of a list, or coded words."""
    import numpy as np
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, vt_utils

    # The harness uses the global random generators.
    before = random.getstate(), np.random.get_state()
    random.seed(key)
    cwe_utils.RNG.seed(key)
    np.random.seed(random.randrange(2**32))
    try:
        if task == "vt":
            text, expected = vt_utils.generate_input_output(size + 5, num_chains=1, num_hops=4)
            return text.rstrip(), expected
        if task == "cwe":
            example, text, expected = cwe_utils.generate_input_output(NUM_COMMON_WORDS + size, length)
            return f"{example}\n{text}", expected
        text, expected, _ = fwe_utils.generate_input_output(
            10**9, tokenizer, num_words=MIN_CODED_WORDS + 10 * size, vocab_size=max(length // 50, 10)
        )
        return text, expected
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
