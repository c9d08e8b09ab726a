"""What differs between the versions of vLLM that we support; no other module of this package knows of it.

Found by feature, not by number. Each seam says what differs, and when it can go.
"""

import inspect
from typing import Any

from vllm.outputs import RequestError
from vllm.v1.core.block_pool import BlockPool

__all__ = ["fail_request", "get_kv_cache_config_from_groups", "get_kv_cache_groups", "spare_request", "stored_event"]

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


def stored_event(pool: BlockPool, *args: Any, **kwargs: Any) -> Any:
    """A KV event of blocks that are findable.

    Since 0.33 it also wants the tokens behind a block that its hash covers. Those are for drafts by a model, which we
    refuse, so there are none. Written out at its caller once 0.32 goes.
    """
    return pool._build_block_stored_event(*args, **kwargs, **_NO_LOOKAHEAD)
