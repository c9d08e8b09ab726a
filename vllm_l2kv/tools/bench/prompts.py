"""Prompts of real text and exact length, as token ids, so that the model's tokenizer is not needed here."""

from collections.abc import Sequence
from random import Random

MIN_TOKENS = 8
"""Room for the tokens that tell prompts apart."""


class Prompts:
    """Cuts prompts out of a text.

    The server's prefix cache must find nothing of one round in another, or what is measured later would profit from
    what was measured before. So after the BOS comes a token that belongs to the round, and after what the round's
    prompts share come two that belong to the request.

    Args:
        text: Token ids of the text, without special tokens.
        bos: What the tokenizer puts before every prompt; may be empty.
        shared: Share of each prompt that it has in common with others of its round, in [0, 1).
        seed: Another one makes other prompts.
    """

    def __init__(self, text: Sequence[int], bos: Sequence[int], shared: float, seed: int) -> None:
        self._text, self._bos, self._shared, self._seed = text, bos, shared, seed
        self._marks = sorted(set(text))
        Random(f"{seed} marks").shuffle(self._marks)

    def prompt(self, round_number: int, number: int, length: int) -> list[int]:
        """Token ids of one request's prompt; the same arguments make the same prompt.

        Args:
            round_number: Of the round, less than the number of different tokens in the text.
            number: Of the request in its round, less than the square of that.
            length: Tokens, at least `MIN_TOKENS`.
        """
        begin = [*self._bos, self._marks[round_number]]
        num_shared = max(int(self._shared * length), len(begin))
        common = begin + self._cut(f"{round_number}", num_shared - len(begin))
        high, low = divmod(number, len(self._marks))
        own = [self._marks[high], self._marks[low]]
        rest = self._cut(f"{round_number} {number}", max(length - len(common) - len(own), 0))
        return [*common, *own, *rest][:length]

    def _cut(self, name: str, length: int) -> list[int]:
        """Tokens in a row; after the end of the text comes its beginning."""
        start = Random(f"{self._seed} {name}").randrange(len(self._text))
        found = list(self._text[start : start + length])
        while len(found) < length:
            found += self._text[: length - len(found)]
        return found
