"""A needle in a haystack of essays.

Source: Devoto et al., arXiv 2406.11430, section 3, with needle, question and word-overlap score of the authors' code.
The haystack is a text in the public domain. As in RULER, the prompt includes the start of the answer, for small models.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from vllm_l2kv.tools.evaluation.cases import Answer, Case
from vllm_l2kv.tools.evaluation.texts import encode, largest, num_shared

ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day."
NEEDLE = f"The best thing to do in San Francisco is {ANSWER}"
BEFORE = "This is a very long story book: <book> "
AFTER = (
    " </book>.\n Based on the content of the book, Question: What is the best thing to do in San Francisco?\n"
    "Answer: The best thing to do in San Francisco is"
)
NUM_ANSWER_TOKENS = 50


def cases(
    tokenizer: Any, text: str, lengths: Sequence[int], depths: Sequence[float], num_samples: int, seed: int = 0
) -> Iterator[Case]:
    """Prompts for each length (most tokens), depth and sample; each takes another part of the text.

    Raises:
        ValueError: The text or a length is too short.
    """
    sentences = sentences_of(text)
    chance = random.Random(seed)
    for length in lengths:
        for depth in depths:
            for sample in range(num_samples):
                start = chance.randrange(max(len(sentences) // 2, 1))
                haystack = sentences[start:]
                token_ids = partial(_token_ids, tokenizer, haystack, depth)
                # Every sentence has at least two tokens.
                most = min(len(haystack), length // 2)
                num_sentences = largest(most, lambda n: len(token_ids(n)) <= length)  # noqa: B023
                if num_sentences == len(haystack):
                    raise ValueError(f"The text is too short for a haystack of {length} tokens; give a longer one.")
                if num_sentences == 0:
                    raise ValueError(f"A haystack does not fit into {length} tokens; give a greater length.")
                yield Case(
                    prompt=(prompt := token_ids(num_sentences)),
                    num_tokens=NUM_ANSWER_TOKENS,
                    score=score,
                    about={"length": length, "depth": depth, "sample": sample},
                    num_document_tokens=num_shared(prompt, token_ids(num_sentences, question="")),
                )


def _token_ids(
    tokenizer: Any, sentences: Sequence[str], depth: float, num_sentences: int, question: str = AFTER
) -> list[int]:
    return encode(tokenizer, BEFORE + hide(NEEDLE, sentences[:num_sentences], depth) + question)


def sentences_of(text: str) -> list[str]:
    """Splits a text roughly into sentences, at punctuation."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


def hide(needle: str, sentences: Sequence[str], depth: float) -> str:
    """Puts a needle between sentences, after `depth` of them."""
    before = round(depth * len(sentences))
    return " ".join([*sentences[:before], needle, *sentences[before:]])


def score(answer: Answer) -> Mapping[str, Any]:
    """Share of the needle's words in the answer, as the authors count it, and whether it is there word for word."""
    expected = set(ANSWER.lower().split())
    said = set(answer.text.lower().split())
    exact = ANSWER.lower().rstrip(".") in " ".join(answer.text.lower().split())
    return {"score": len(said & expected) / len(expected), "exact": float(exact), "answer": answer.text}
