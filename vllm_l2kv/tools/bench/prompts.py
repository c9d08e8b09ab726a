"""Prompts of natural text with exact lengths, as token ids, so that no tokenizer is needed here."""

from collections.abc import Sequence
from random import Random

MIN_TOKENS = 8
"""Shortest prompt: room for the tokens that make prompts different."""


class Prompts:
    """Cuts prompts out of a text.

    The prefix cache must not find prompts of an earlier round, or later rounds would look faster. So a token that is
    unique to the round follows the BOS, and two tokens that are unique to the request follow the part that the round's
    prompts share.

    Args:
        text: Token ids of the text, without special tokens.
        bos: Token ids that the tokenizer puts before every prompt; may be empty.
        shared: Share of each prompt that all prompts of a round share, in [0, 1).
        seed: Seed of the prompts.
    """

    def __init__(self, text: Sequence[int], bos: Sequence[int], shared: float, seed: int) -> None:
        self._text, self._bos, self._shared, self._seed = text, bos, shared, seed
        self._marks = sorted(set(text))
        Random(f"{seed} marks").shuffle(self._marks)

    def prompt(self, round_number: int, number: int, length: int) -> list[int]:
        """Token ids of one request's prompt; the same arguments give the same prompt.

        Args:
            round_number: Number of the round, less than the number of distinct tokens in the text.
            number: Number of the request in its round, less than the square of that.
            length: Length in tokens, at least `MIN_TOKENS`.
        """
        begin = [*self._bos, self._marks[round_number]]
        num_shared = max(int(self._shared * length), len(begin))
        common = begin + self._cut(f"{round_number}", num_shared - len(begin))
        high, low = divmod(number, len(self._marks))
        own = [self._marks[high], self._marks[low]]
        rest = self._cut(f"{round_number} {number}", max(length - len(common) - len(own), 0))
        return [*common, *own, *rest][:length]

    def _cut(self, name: str, length: int) -> list[int]:
        """Consecutive tokens of the text, which wraps around at its end."""
        start = Random(f"{self._seed} {name}").randrange(len(self._text))
        found = list(self._text[start : start + length])
        while len(found) < length:
            found += self._text[: length - len(found)]
        return found
