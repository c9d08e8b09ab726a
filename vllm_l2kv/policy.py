"""When a request is compacted, and how many rows are kept: integers in, integers out.

Both depend only on the request's own length, images and parameters: not on the batch, the chunks of its prompt,
preemption or prefix-cache hits. So the scheduler knows them without asking the worker, tensor-parallel ranks agree
without communication, and an answer depends only on its request.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import CompressionParams


class Intervals(NamedTuple):
    """Rows beyond its budget that a request may hold until it is compacted to the budget.

    Attributes:
        prompt: Rows before the end of the prompt. It limits the length of prefill chunks, so it is large.
        answer: Rows from the end of the prompt on.
    """

    prompt: int = 2048
    answer: int = 256


Images = tuple[tuple[int, int], ...]
"""First and last positions of images in a prompt."""


def image_around(images: Images, position: int) -> tuple[int, int] | None:
    """First and last positions of the image that an end at `position` tokens would divide; `None` without one."""
    return next(((first, last) for first, last in images if first < position <= last), None)


class Kind(StrEnum):
    """Why a request is compacted.

    By its ratio at the end of the prompt, at the end of its document, or by its budget: before the end of the prompt,
    or from there on.
    """

    RATIO = "ratio"
    DOCUMENT = "document"
    PROMPT_BUDGET = "prompt_budget"
    ANSWER_BUDGET = "answer_budget"


class Compaction(NamedTuple):
    """One compaction of a request.

    Attributes:
        position: Number of computed tokens at which it happens; the next token attends to the kept rows.
        num_rows: Rows that each head of a compressed layer holds before it, all of them candidates for eviction.
        num_keep: Rows that each head keeps.
        kind: Why it happens.
    """

    position: int
    num_rows: int
    num_keep: int
    kind: Kind

    @property
    def num_evicted(self) -> int:
        """Tokens evicted by this compaction and all earlier ones: `position - num_evicted` is a later token's slot."""
        return self.position - self.num_keep


@dataclass(frozen=True)
class CompactionPoints:
    """The compactions of one request, in the order of their positions.

    A request with a ratio is compacted to `num_keep` rows at the end of its prompt. A request with a budget is
    compacted to the budget as soon as it holds an interval more than that. Where both are due, only the one that leaves
    fewer rows happens. For a request with a document, the ratio applies to the document instead of the prompt. The
    budget also applies at the end of the document, so that what follows begins with the document's compressed rows.

    A compaction by the budget that is due inside an image in `images` happens at its first position. It stays inside if
    there is nothing to evict there, which takes an image of more tokens than the prompt's interval.

    Attributes:
        num_prompt_tokens: Length n of the prompt, n >= 1.
        params: The request's ratio, budget and protection.
        intervals: The engine's intervals.
        images: First and last positions of images in the prompt that must be computed in one step.
    """

    num_prompt_tokens: int
    params: CompressionParams
    intervals: Intervals
    images: Images = ()

    @classmethod
    def of(
        cls, num_prompt_tokens: int, params: CompressionParams, intervals: Intervals, images: Images = ()
    ) -> "CompactionPoints | None":
        """The compactions of a request; `None` if it is kept whole.

        Raises:
            ParamError: No token follows its document.
        """
        document = params.prefix_tokens
        if document is not None and document >= num_prompt_tokens:
            raise ParamError(
                "kv_prefix_tokens",
                f"kv_prefix_tokens must be less than the prompt's {num_prompt_tokens} tokens, got {document}; at least "
                "one token must follow the document.",
            )
        return cls(num_prompt_tokens, params, intervals, images) if params.compresses else None

    def after(self, last: Compaction | None) -> Compaction | None:
        """The compaction that follows `last`, or the first one if `last` is `None`; `None` if there is none."""
        due = [compaction for compaction in (self._by_ratio(last), self._by_budget(last)) if compaction is not None]
        return min(due, key=lambda compaction: (compaction.position, compaction.num_keep), default=None)

    def until(self, num_tokens: int) -> Iterator[Compaction]:
        """The compactions at positions up to `num_tokens`."""
        compaction = self.after(None)
        while compaction is not None and compaction.position <= num_tokens:
            yield compaction
            compaction = self.after(compaction)

    def in_prompt(self) -> list[Compaction]:
        """The compactions before the end of the prompt.

        They depend on the prompt's tokens up to their position, not on its length. So every request whose prompt
        begins with the same tokens can use their rows.
        """
        return list(self.until(self.num_prompt_tokens - 1))

    def to_publish(self) -> list[Compaction]:
        """The compactions of `in_prompt` whose rows later requests are likely to use.

        The last one, for the next turn of a conversation, and the last one in the document, for other questions.
        """
        found = self.in_prompt()
        in_document = [compaction for compaction in found if compaction.position <= (self.params.prefix_tokens or 0)]
        return list(dict.fromkeys([*in_document[-1:], *found[-1:]]))

    def max_rows(self, num_tokens: int, last: Compaction | None = None) -> int:
        """Upper bound on the rows that a head of a compressed layer holds at any time while `num_tokens` are computed.

        A request without images whose answer is long enough reaches it.

        Args:
            num_tokens: All tokens that the request computes or finds in the cache.
            last: The compaction whose rows the request begins on; `None` if it computes all tokens itself.
        """
        budget, num_evicted = self.params.max_tokens, last.num_evicted if last else 0
        if budget is not None:
            in_prompt = min(self.num_prompt_tokens - num_evicted, budget + self.intervals.prompt)
            most = max(in_prompt, budget + self.intervals.answer)
            return min(num_tokens - num_evicted, most)
        coming = self.after(last)
        if coming is None or num_tokens <= coming.position:
            return num_tokens - num_evicted
        return max(coming.num_rows, num_tokens - coming.num_evicted)

    def _by_ratio(self, last: Compaction | None) -> Compaction | None:
        budget, document = self.params.max_tokens, self.params.prefix_tokens
        end, num_evicted = document or self.num_prompt_tokens, last.num_evicted if last else 0
        num_rows, keep = end - num_evicted, num_keep(end, self.params)
        if document and budget is not None:
            keep = min(keep, budget)
        if (last is not None and last.position >= end) or keep >= num_rows:
            return None
        return Compaction(end, num_rows, keep, Kind.DOCUMENT if document else Kind.RATIO)

    def _by_budget(self, last: Compaction | None) -> Compaction | None:
        budget, num_evicted = self.params.max_tokens, last.num_evicted if last else 0
        if budget is None:
            return None
        position, kind = num_evicted + budget + self.intervals.prompt, Kind.PROMPT_BUDGET
        if position >= self.num_prompt_tokens:
            position, kind = num_evicted + budget + self.intervals.answer, Kind.ANSWER_BUDGET
            position = max(position, self.num_prompt_tokens)
        image = image_around(self.images, position)
        if image is not None and image[0] - num_evicted > budget:
            position = image[0]
        return Compaction(position, position - num_evicted, budget, kind)


def num_keep(num_prompt_tokens: int, params: CompressionParams) -> int:
    """Tokens of a prompt or a document that each KV head of a compressed layer keeps by the ratio.

    The ceiling is that of the authors' code (Devoto et al., arXiv 2406.11430). Subtracting 1e-9 allows for rounding in
    products such as `0.1 * 30 == 3.0000000000000004`, which would otherwise keep one token too many.

    Args:
        num_prompt_tokens: Length n of the prompt or the document, n >= 1.
        params: The request's ratio and protection.

    Returns:
        `min(n, max(ceil(keep_ratio * n - 1e-9), protect_first + protect_last, 1))`.
    """
    by_ratio = math.ceil(params.keep_ratio * num_prompt_tokens - 1e-9)
    return min(num_prompt_tokens, max(by_ratio, params.protect_first + params.protect_last, 1))
