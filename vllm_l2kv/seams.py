"""Differences between the supported versions of vLLM; no other module of this package depends on them.

They are detected by feature, not by version number. Each says what differs, and when it can be removed.
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
    "groups_of_rank",
    "num_hash_lookahead",
    "spare_request",
    "stored_event",
]

# Moved in 0.33. Remove the second import with 0.32.
try:
    from vllm.v1.core.kv_cache_planning import _project_kv_cache_groups_to_worker as groups_of_rank
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups, get_kv_cache_groups
except ImportError:
    from vllm.v1.core.kv_cache_utils import _project_kv_cache_groups_to_worker as groups_of_rank
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups

_NO_LOOKAHEAD: dict[str, None] = (
    {"lookahead_token_ids": None}
    if "lookahead_token_ids" in inspect.signature(BlockPool._build_block_stored_event).parameters
    else {}
)


def draft_layers(runner: Any, layers: Mapping[str, Any]) -> set[str]:
    """Names of the draft model's layers, once it is loaded.

    vLLM marks these layers. In 0.32 it does not for runner V1, whose drafter lists them: remove that with 0.32.

    Args:
        runner: vLLM's runner, of any version.
        layers: All of vLLM's layers by name.
    """
    marked = {name for name, layer in layers.items() if getattr(layer, "is_draft_layer", False)}
    return marked or set(getattr(getattr(runner, "drafter", None), "_draft_attn_layer_names", ()))


def fail_request(scheduler: Any, req_id: str, sentence: str) -> None:
    """Makes vLLM's scheduler fail a request at the end of the next step.

    vLLM keeps failing requests in a set of ids in 0.32. In 0.33 it is a dict, replaced after each step, and the front
    end answers 400 with the sentence. Remove the branch for the set with 0.32.
    """
    failing = scheduler.grammar_compile_error_reqs
    if isinstance(failing, dict):
        failing[req_id] = RequestError(code="validation_error", message=sentence)
    else:
        failing.add(req_id)


def spare_request(scheduler: Any, req_id: str) -> None:
    """Undoes `fail_request`, if it was called. Remove the branch for the set with 0.32."""
    failing = scheduler.grammar_compile_error_reqs
    if isinstance(failing, dict):
        failing.pop(req_id, None)
    else:
        failing.discard(req_id)


def num_hash_lookahead(pool: BlockPool) -> int:
    """Tokens after a block that its hash also covers, since the draft model has read them. New in 0.33; 0 in 0.32."""
    return getattr(pool, "num_hash_lookahead_tokens", 0)


def stored_event(pool: BlockPool, request: Any, *, block_hashes: list[Any], end_token_idx: int, **others: Any) -> Any:
    """A KV event of blocks that were added to the prefix cache.

    Since 0.33 the event also needs the tokens after each block that its hash covers. Inline this with 0.32.
    """
    lookahead: dict[str, Any] = dict(_NO_LOOKAHEAD)
    if num_ahead := num_hash_lookahead(pool):
        ahead = request.all_token_ids[end_token_idx : end_token_idx + num_ahead]
        lookahead["lookahead_token_ids"] = [ahead] * len(block_hashes)
    return pool._build_block_stored_event(
        request, block_hashes=block_hashes, end_token_idx=end_token_idx, **others, **lookahead
    )
