"""How well a text's continuation is predicted after its beginning was compressed.

Unlike in the paper (section 3, language modelling), which evicts token by token while the text is read, the context is
compressed once, at its end, as the server does it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_l2kv.tools.evaluation.cases import Answer, Case
from vllm_l2kv.tools.evaluation.texts import encode


def cases(
    tokenizer: Any, text: str, lengths: Sequence[int], num_samples: int, num_continued: int = 128
) -> Iterator[Case]:
    """Pieces of a text, spread evenly over it.

    Args:
        tokenizer: The model's.
        text: Of which each sample takes a piece of its own.
        lengths: Tokens of the context.
        num_samples: Pieces for each length.
        num_continued: Tokens of the continuation.

    Raises:
        ValueError: The text is shorter than one piece.
    """
    token_ids = encode(tokenizer, text)
    bos = encode(tokenizer, "")
    body = token_ids[len(bos) :]
    for length in lengths:
        size = length - len(bos) + num_continued + 1
        if size > len(body):
            raise ValueError(f"The text has {len(body)} tokens, {size} are needed for a context of {length}.")
        for sample in range(num_samples):
            start = sample * (len(body) - size) // max(num_samples - 1, 1)
            piece = bos + body[start : start + size]
            yield Case(
                prompt=piece[:length],
                num_tokens=num_continued + 1,
                forced=tuple(piece[length:]),
                score=score,
                about={"length": length, "sample": sample},
                # At least one token must follow a document.
                num_document_tokens=length - 1,
            )


def score(answer: Answer) -> Mapping[str, Any]:
    """Losses in nats and hits by position, and their means.

    The first token of the continuation is left out: it is predicted from the whole cache.
    """
    losses, hits = answer.losses[1:], answer.hits[1:]
    return {
        "loss": round(sum(losses) / len(losses), 5),
        "accuracy": round(sum(hits) / len(hits), 5),
        "losses": [round(loss, 4) for loss in losses],
        "hits": [int(hit) for hit in hits],
    }
