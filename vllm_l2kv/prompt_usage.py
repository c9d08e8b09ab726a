"""What an answer's `usage.kv_cache` says of a prompt: how many of its tokens were kept, and why all of them were."""

from enum import StrEnum

from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import num_keep

REASON = "reason"


class KeptWhole(StrEnum):
    """Why nothing of a prompt was evicted although its keep ratio is below 1: the cause, then the remedy."""

    PROTECTED = "kv_protect_first and kv_protect_last cover the whole prompt; lower them to evict some of it."
    ROUNDED = "kv_keep_ratio rounds up to the whole prompt; lower it to evict some of it."
    FIRST_TOKEN = "A prompt is compressed after the first token of its answer; raise max_tokens if that cut it off."
    NO_BLOCKS = "The KV cache had no free blocks to compress the prompt into; send fewer requests at once."


def prompt_usage(num_prompt_tokens: int, num_kept: int, reason: KeptWhole | None = None) -> dict[str, int | str]:
    """The object under `usage.kv_cache`.

    Args:
        num_prompt_tokens: The prompt's length.
        num_kept: Tokens of it that each KV head of a compressed layer keeps.
        reason: Why that is all of them although the keep ratio is below 1.
    """
    usage: dict[str, int | str] = {
        "prompt_tokens": num_prompt_tokens,
        "kept_tokens": num_kept,
        "evicted_tokens": num_prompt_tokens - num_kept,
    }
    return usage if reason is None else {**usage, REASON: reason.value}


def before_compaction(num_prompt_tokens: int, params: CompressionParams) -> dict[str, int | str]:
    """As long as a prompt is not compressed: whole, with the reason if it is going to stay so.

    A prompt that waits for its compaction has `FIRST_TOKEN`, which is right if the answer ends here.
    """
    if params.keep_ratio == 1:
        return prompt_usage(num_prompt_tokens, num_prompt_tokens)
    reason = KeptWhole.FIRST_TOKEN
    if num_keep(num_prompt_tokens, params) == num_prompt_tokens:
        is_protected = params.protect_first + params.protect_last >= num_prompt_tokens
        reason = KeptWhole.PROTECTED if is_protected else KeptWhole.ROUNDED
    return prompt_usage(num_prompt_tokens, num_prompt_tokens, reason)
