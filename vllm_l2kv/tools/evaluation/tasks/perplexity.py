"""How well a model predicts the continuation of a text whose first part was compressed.

The paper (section 3, language modeling) evicts token by token while the text is read. Here the context is compressed
once, at its end, as a server does.
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
        tokenizer: The model's tokenizer.
        text: Text from which each sample takes another piece.
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
            raise ValueError(
                f"The text must have at least {size} tokens for a context of {length}, got {len(body)}; give another."
            )
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

    The first token of the continuation is left out, since it is predicted from the whole cache.
    """
    losses, hits = answer.losses[1:], answer.hits[1:]
    return {
        "loss": round(sum(losses) / len(losses), 5),
        "accuracy": round(sum(hits) / len(hits), 5),
        "losses": [round(loss, 4) for loss in losses],
        "hits": [int(hit) for hit in hits],
    }
