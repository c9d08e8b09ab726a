"""The `usage.kv_cache` of an answer: how many tokens were kept and evicted, or why none were evicted.

The `kv_transfer_params` of every output carry it: a dict that vLLM passes from `EngineCoreOutput` to `RequestOutput`
unread, and that is empty without a KV connector.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, NotRequired, TypedDict

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import num_keep

MEMORY_RATIO_DIGITS = 4
"""Digits after the decimal point of a reported memory ratio."""
USAGE_KEY = "kv_cache"
"""Key in an answer's `usage`, and in `kv_transfer_params`."""
REASON = "reason"


class KeptWhole(StrEnum):
    """Why nothing was evicted although the request asks for compression: the cause, then the remedy."""

    PROTECTED = (
        "kv_protect_first and kv_protect_last cover the whole prompt or document; lower them to evict some of it."
    )
    ROUNDED = "kv_keep_ratio rounds up to the whole prompt or document; lower it to evict some of it."
    FIRST_TOKEN = "The prompt is compressed after the first token of the answer; raise max_tokens to get more tokens."
    BUDGET = "The request stayed below kv_max_tokens plus the server's interval; lower kv_max_tokens to evict sooner."
    WHOLE_DOCUMENT = (
        "kv_keep_ratio is 1, which keeps the whole document of kv_prefix_messages or kv_prefix_tokens; lower it to "
        "evict some of it."
    )
    DECODED_ELSEWHERE = "Another engine decodes the answer, and compresses there."
    SESSION = "Streaming input is not compressed; give the whole prompt at once."


class RequestUsage(TypedDict):
    """The object under `usage.kv_cache`.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        kept_tokens: Rows that each head of a compressed layer holds: all tokens except the last one of the answer,
            which was never an input, minus the evicted tokens.
        evicted_tokens: Tokens that each head has evicted, of the prompt and the answer.
        compactions: How often the request was compacted.
        memory_ratio: Memory that the rows take, divided by what all tokens would take uncompressed. Full layers count,
            layers with a sliding window do not.
        found_tokens: Tokens of the prompt whose compacted rows were found in the cache, left by an earlier request.
            `compactions` includes theirs. Absent if there are none and the request has no document.
        max_tokens: The bound on the answer's length, if the request gave none and the cache cannot hold the rest of
            the context.
        reason: Why nothing was evicted although the request asks for compression; a value of `KeptWhole`.
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
    """Why a request that ends before its first compaction was kept whole; `None` if it asks for no compression.

    `FIRST_TOKEN` if the prompt would be compacted before the second token of the answer.
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
    """The memory ratio of one or more requests together, from their `RequestUsage`."""
    held = whole = 0.0
    for usage in usages:
        num_tokens = usage["kept_tokens"] + usage["evicted_tokens"]
        held += usage["memory_ratio"] * num_tokens
        whole += num_tokens
    return round(held / whole, MEMORY_RATIO_DIGITS)


def attach_usage(output: Any, usage: RequestUsage) -> None:
    """Puts a request's usage on an `EngineCoreOutput`, beside the entries of a KV connector."""
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), USAGE_KEY: usage}


def take_usage(output: Any) -> RequestUsage | None:
    """Removes a request's usage from a `RequestOutput` and returns it, since vLLM would show the dict to clients."""
    others = dict(output.kv_transfer_params or {})
    usage: RequestUsage | None = others.pop(USAGE_KEY, None)
    if usage is not None:
        output.kv_transfer_params = others or None
    return usage
