"""What an answer's `usage.kv_cache` says of its request: how many tokens were kept and evicted, and why none were.

Rides on the `kv_transfer_params` of every output of the request: a free dict, empty without a KV connector, which vLLM
hands on from `EngineCoreOutput` to `RequestOutput`.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, NotRequired, TypedDict

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import num_keep

MEMORY_RATIO_DIGITS = 4
"""To which shares of memory are rounded."""
USAGE_KEY = "kv_cache"
"""Its name in an answer's `usage`, and in `kv_transfer_params`."""
REASON = "reason"


class KeptWhole(StrEnum):
    """Why nothing of a request was evicted although it asks for that: the cause, then the remedy."""

    PROTECTED = (
        "kv_protect_first and kv_protect_last cover the whole prompt or document; lower them to evict some of it."
    )
    ROUNDED = "kv_keep_ratio rounds up to the whole prompt or document; lower it to evict some of it."
    FIRST_TOKEN = "A prompt is compressed after the first token of its answer; raise max_tokens if that cut it off."
    BUDGET = "kv_max_tokens and the server's interval were not reached together; lower it to evict sooner."
    WHOLE_DOCUMENT = (
        "kv_keep_ratio is 1, which keeps the document of kv_prefix_tokens whole; lower it to evict some of it."
    )
    SESSION = "Streaming input is not compressed; give the whole prompt at once."


class RequestUsage(TypedDict):
    """The object under `usage.kv_cache`.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        kept_tokens: Rows that each head of a compressed layer holds: all tokens but the last one of the answer, which
            was never computed on, less the evicted ones.
        evicted_tokens: Tokens that each head has evicted, those of the answer included.
        compactions: How often the request was compacted.
        memory_ratio: Memory of the whole cache that the rows take, over what all tokens would take; full layers
            count, layers with a sliding window do not.
        found_tokens: Tokens of the prompt whose compressed rows an earlier request had left in the cache; their
            compactions count above. Absent for a request without a document, if there are none.
        max_tokens: The bound of the answer's length, if the request named none and the cache cannot hold the rest of
            the context.
        reason: Why nothing was evicted although the request asks for that.
    """

    prompt_tokens: int
    kept_tokens: int
    evicted_tokens: int
    compactions: int
    memory_ratio: float
    found_tokens: NotRequired[int]
    max_tokens: NotRequired[int]
    reason: NotRequired[str]


def why_whole(num_prompt_tokens: int, params: CompressionParams) -> KeptWhole | None:
    """Why a request that ends before its first compaction was kept whole; `None` if it asks for none.

    A prompt that is still to be compacted at its end has `FIRST_TOKEN`, which is right if the answer ends here.
    """
    end = params.prefix_tokens or num_prompt_tokens
    if params.keep_ratio < 1 and num_keep(end, params) < end:
        return KeptWhole.FIRST_TOKEN
    if params.max_tokens is not None:
        return KeptWhole.BUDGET
    if params.keep_ratio == 1:
        return None if params.prefix_tokens is None else KeptWhole.WHOLE_DOCUMENT
    is_protected = params.protect_first + params.protect_last >= end
    return KeptWhole.PROTECTED if is_protected else KeptWhole.ROUNDED


def memory_of_all(usages: Iterable[Mapping[str, Any]]) -> float:
    """The memory ratio of several requests together, of one or more `RequestUsage`."""
    held = whole = 0.0
    for usage in usages:
        num_tokens = usage["kept_tokens"] + usage["evicted_tokens"]
        held += usage["memory_ratio"] * num_tokens
        whole += num_tokens
    return round(held / whole, MEMORY_RATIO_DIGITS)


def attach_usage(output: Any, usage: RequestUsage) -> None:
    """Puts a request's usage on an `EngineCoreOutput`, beside what a KV connector has to say."""
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), USAGE_KEY: usage}


def take_usage(output: Any) -> RequestUsage | None:
    """Takes a request's usage off a `RequestOutput`, if it is there; vLLM would show the dict to clients."""
    others = dict(output.kv_transfer_params or {})
    usage: RequestUsage | None = others.pop(USAGE_KEY, None)
    if usage is not None:
        output.kv_transfer_params = others or None
    return usage
