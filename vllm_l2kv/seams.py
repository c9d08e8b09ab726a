"""What differs between the versions of vLLM that we support; no other module of this package knows of it.

Found by feature, not by number. Each seam says what differs, and when it can go.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from vllm.outputs import RequestError
from vllm.v1.core.block_pool import BlockPool

__all__ = [
    "draft_layers",
    "fail_request",
    "get_kv_cache_config_from_groups",
    "get_kv_cache_groups",
    "num_hash_lookahead",
    "spare_request",
    "stored_event",
]

# Moved in 0.33. The second goes with 0.32.
try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups, get_kv_cache_groups
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups

_NO_LOOKAHEAD: dict[str, None] = (
    {"lookahead_token_ids": None}
    if "lookahead_token_ids" in inspect.signature(BlockPool._build_block_stored_event).parameters
    else {}
)


def draft_layers(runner: Any, layers: Mapping[str, Any]) -> set[str]:
    """Names of the layers that a model for drafts has among vLLM's, once it is loaded.

    vLLM marks them, but in 0.32 not for runner V1, whose drafter knows them. The second line goes with 0.32.

    Args:
        runner: vLLM's, of any version.
        layers: vLLM's, by name.
    """
    marked = {name for name, layer in layers.items() if getattr(layer, "is_draft_layer", False)}
    return marked or set(getattr(getattr(runner, "drafter", None), "_draft_attn_layer_names", ()))


def fail_request(scheduler: Any, req_id: str, sentence: str) -> None:
    """Lets vLLM's scheduler fail a request at the end of the next step.

    A set of ids in 0.32. In 0.33 a dict, a new one after each step, and the front end answers 400 with the sentence.
    The branch for the set goes with 0.32.
    """
    failing = scheduler.grammar_compile_error_reqs
    if isinstance(failing, dict):
        failing[req_id] = RequestError(code="validation_error", message=sentence)
    else:
        failing.add(req_id)


def spare_request(scheduler: Any, req_id: str) -> None:
    """Takes `fail_request` back, if it was called. The branch for the set goes with 0.32."""
    failing = scheduler.grammar_compile_error_reqs
    if isinstance(failing, dict):
        failing.pop(req_id, None)
    else:
        failing.discard(req_id)


def num_hash_lookahead(pool: BlockPool) -> int:
    """Tokens after a block that its hash covers too, since what drafts has read them. Since 0.33, and 0 in 0.32."""
    return getattr(pool, "num_hash_lookahead_tokens", 0)


def stored_event(pool: BlockPool, request: Any, *, block_hashes: list[Any], end_token_idx: int, **others: Any) -> Any:
    """A KV event of blocks that are findable.

    Since 0.33 it also wants the tokens after a block that its hash covers. Written out at its callers once 0.32 goes.
    """
    lookahead: dict[str, Any] = dict(_NO_LOOKAHEAD)
    if num_ahead := num_hash_lookahead(pool):
        ahead = request.all_token_ids[end_token_idx : end_token_idx + num_ahead]
        lookahead["lookahead_token_ids"] = [ahead] * len(block_hashes)
    return pool._build_block_stored_event(
        request, block_hashes=block_hashes, end_token_idx=end_token_idx, **others, **lookahead
    )
