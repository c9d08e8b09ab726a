"""A list that the model must repeat, item by item.

The answer is as long as the list, and each item is right or wrong. So this task shows what it costs when a budget
evicts generated tokens; the answers of other tasks have only a few words. Items are numbered and the prompt includes
the start of the answer, since small models do not copy otherwise.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from vllm_l2kv.tools.evaluation.cases import Answer, Case
from vllm_l2kv.tools.evaluation.tasks.ruler import words
from vllm_l2kv.tools.evaluation.texts import encode, largest, num_shared

BEFORE = "List:\n"
AFTER = "\n\nThe same list again:\n"
BEGUN = "1."
"""Start of the answer, which is part of the prompt."""
NUM_MORE_TOKENS = 8
"""Additional tokens for the end of the last line, so that a longer word is not taken for the item."""


def cases(tokenizer: Any, lengths: Sequence[int], num_samples: int, seed: int = 0) -> Iterator[Case]:
    """Prompts for each length (in tokens, with the answer) and sample, with as many items as fit.

    Raises:
        ValueError: A length is too short.
    """
    nouns = [noun for noun in words()[1] if noun.isalpha()]
    for length in lengths:
        for sample in range(num_samples):
            items = nouns.copy()
            random.Random(f"{seed}-copy-{length}-{sample}").shuffle(items)
            # A line has more than two tokens.
            num_items = largest(min(len(items), length // 4), lambda n: _size(tokenizer, items[:n]) <= length)  # noqa: B023
            if num_items == 0:
                raise ValueError(f"A list and its copy do not fit into {length} tokens; give a greater length.")
            chosen = items[:num_items]
            token_ids = encode(tokenizer, prompt(chosen))
            yield Case(
                prompt=token_ids,
                num_tokens=_num_answer_tokens(tokenizer, chosen),
                score=partial(score, chosen),
                about={"length": length, "items": num_items, "sample": sample},
                num_document_tokens=num_shared(token_ids, encode(tokenizer, BEFORE + lines(chosen))),
            )


def prompt(items: Sequence[str]) -> str:
    """The list, and the start of its copy."""
    return BEFORE + lines(items) + AFTER + BEGUN


def lines(items: Sequence[str]) -> str:
    """The list: a number, a full stop and an item in each line."""
    return "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))


def score(items: Sequence[str], answer: Answer) -> Mapping[str, Any]:
    """Share of the items that the answer has, spelled exactly and in the line of their number."""
    said = (BEGUN + answer.text).splitlines()
    num_right = sum(line.strip() == right for line, right in zip(said, lines(items).splitlines(), strict=False))
    return {"score": num_right / len(items), "answer": answer.text}


def _size(tokenizer: Any, items: Sequence[str]) -> int:
    return len(encode(tokenizer, prompt(items))) + _num_answer_tokens(tokenizer, items)


def _num_answer_tokens(tokenizer: Any, items: Sequence[str]) -> int:
    num_bos = len(encode(tokenizer, ""))
    return len(encode(tokenizer, lines(items).removeprefix(BEGUN))) - num_bos + NUM_MORE_TOKENS
