"""What an answer's `usage.kv_cache` says of a prompt: how many of its tokens were kept, and why all of them were.

Rides on the `kv_transfer_params` of every output of the request: a free dict, idle without a KV connector, which vLLM
hands on from `EngineCoreOutput` to `RequestOutput`.
"""

from enum import StrEnum
from typing import Any, NotRequired, TypedDict

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import num_keep

USAGE_KEY = "kv_cache"
"""Its name in an answer's `usage`, and in `kv_transfer_params`."""
REASON = "reason"


class KeptWhole(StrEnum):
    """Why nothing of a prompt was evicted although its keep ratio is below 1: the cause, then the remedy."""

    PROTECTED = "kv_protect_first and kv_protect_last cover the whole prompt; lower them to evict some of it."
    ROUNDED = "kv_keep_ratio rounds up to the whole prompt; lower it to evict some of it."
    FIRST_TOKEN = "A prompt is compressed after the first token of its answer; raise max_tokens if that cut it off."
    SESSION = "Streaming input is not compressed; give the whole prompt at once."


class PromptUsage(TypedDict):
    """The object under `usage.kv_cache`."""

    prompt_tokens: int
    kept_tokens: int
    evicted_tokens: int
    reason: NotRequired[str]


def prompt_usage(num_prompt_tokens: int, num_kept: int, reason: str | None = None) -> PromptUsage:
    """The usage of one prompt.

    Args:
        num_prompt_tokens: The prompt's length.
        num_kept: Tokens of it that each KV head of a compressed layer keeps.
        reason: Why that is all of them although the keep ratio is below 1.
    """
    usage = PromptUsage(
        prompt_tokens=num_prompt_tokens, kept_tokens=num_kept, evicted_tokens=num_prompt_tokens - num_kept
    )
    if reason is not None:
        usage["reason"] = str(reason)
    return usage


def why_whole(num_prompt_tokens: int, params: CompressionParams) -> KeptWhole | None:
    """Why a prompt that is not compressed is whole; `None` if its keep ratio is 1.

    A prompt that is still to be compressed has `FIRST_TOKEN`, which is right if the answer ends here.
    """
    if params.keep_ratio == 1:
        return None
    if num_keep(num_prompt_tokens, params) < num_prompt_tokens:
        return KeptWhole.FIRST_TOKEN
    is_protected = params.protect_first + params.protect_last >= num_prompt_tokens
    return KeptWhole.PROTECTED if is_protected else KeptWhole.ROUNDED


def attach_usage(output: Any, usage: PromptUsage) -> None:
    """Puts a prompt's usage on an `EngineCoreOutput`."""
    output.kv_transfer_params = {USAGE_KEY: usage}


def take_usage(output: Any) -> PromptUsage | None:
    """Takes a prompt's usage off a `RequestOutput`, if it is there; vLLM would show the dict to clients."""
    usage: PromptUsage | None = (output.kv_transfer_params or {}).get(USAGE_KEY)
    if usage is not None:
        output.kv_transfer_params = None
    return usage
