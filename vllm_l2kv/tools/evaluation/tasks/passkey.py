"""A number hidden in noise.

Source: the passkey protocol of Devoto et al., arXiv 2406.11430, section 3, which is LongLoRA's (arXiv 2309.12307).
Here depths are on a grid instead of random. As there, the first token of the answer is computed from the whole cache.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from vllm_l2kv.tools.evaluation.cases import Answer, Case
from vllm_l2kv.tools.evaluation.texts import encode, largest, num_shared

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"
NUM_ANSWER_TOKENS = 8


def cases(
    tokenizer: Any, lengths: Sequence[int], depths: Sequence[float], num_samples: int, seed: int = 0
) -> Iterator[Case]:
    """Prompts for each length (most tokens), depth (0 is the start) and sample.

    Raises:
        ValueError: A length is too short.
    """
    chance = random.Random(seed)
    for length in lengths:
        num_noises = largest(length, lambda n: len(encode(tokenizer, prompt(49_999, n, 0.5))) <= length)  # noqa: B023
        if len(encode(tokenizer, prompt(49_999, num_noises, 0.5))) > length:
            raise ValueError(f"A prompt with a pass key does not fit into {length} tokens; give a greater length.")
        for depth in depths:
            for sample in range(num_samples):
                key = chance.randrange(1, 50_000)
                text = prompt(key, num_noises, depth)
                token_ids = encode(tokenizer, text)
                yield Case(
                    prompt=token_ids,
                    num_tokens=NUM_ANSWER_TOKENS,
                    score=partial(score, key),
                    about={"length": length, "depth": depth, "sample": sample},
                    num_document_tokens=num_shared(token_ids, encode(tokenizer, text.removesuffix(QUESTION))),
                )


def prompt(key: int, num_noises: int, depth: float) -> str:
    """The text that hides a key after `depth` of its noise."""
    before = round(depth * num_noises)
    hidden = f"The pass key is {key}. Remember it. {key} is the pass key."
    noise = [NOISE] * before, [NOISE] * (num_noises - before)
    return "\n".join([TASK, *noise[0], hidden, *noise[1], QUESTION])


def score(key: int, answer: Answer) -> Mapping[str, Any]:
    """1 if the first number of the answer is the key, else 0."""
    found = re.search(r"\d+", answer.text)
    return {"score": float(found is not None and found[0] == str(key)), "answer": answer.text}
