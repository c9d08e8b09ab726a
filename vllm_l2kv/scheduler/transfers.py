"""Prompts that one engine computes and another one decodes: a prefill/decode pair, by vLLM's `NixlConnector`.

The prefilling engine keeps such a prompt whole. The decoding engine loads it and compacts it as after its own prefill.
vLLM compares the model and the attention kernels of the two, but not which layers and heads share the blocks of a
KV-cache group, nor how many ranks divide them. Blocks of another division would be read as something else, without an
error. So the division goes along with the block ids.
"""

from collections.abc import Callable
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from vllm.v1.request import Request

from vllm_l2kv.log import logger_of
from vllm_l2kv.scheduler.external_hits import ExternalHits
from vllm_l2kv.settings import Settings

DIVISION = "l2kv_division"
"""Key in `kv_transfer_params`, beside vLLM's."""

logger = logger_of(__name__)


class Transfers(ExternalHits):
    """Wraps vLLM's `NixlConnector`.

    Args:
        connector: As for `ExternalHits`.
        bound: As for `ExternalHits`.
        kv_cache_config: vLLM's, with the groups of this engine.
        vllm_config: vLLM's, with the settings of this engine.
    """

    def __init__(self, connector: Any, bound: Callable[[Request], int], kv_cache_config: Any, vllm_config: Any) -> None:
        super().__init__(connector, bound)
        self._division = division_of(kv_cache_config, vllm_config)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Same contract as upstream: nothing from an engine whose blocks are divided in another way."""
        params = request.kv_transfer_params or {}
        if params.get("do_remote_prefill") and params.get(DIVISION) != self._division:
            logger.warning(
                "Request %s computes its prompt itself: in the prefilling engine other layers or KV heads are full, "
                "blocks have another size, other ranks share them, or vllm-l2kv is missing. Start both with the same "
                "options.",
                request.request_id,
            )
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def request_finished_all_groups(self, *args: Any, **kwargs: Any) -> tuple[bool, dict[str, Any] | None]:
        """Same contract as upstream, with the division of the blocks that wait for the decoding engine."""
        waits, params = self.connector.request_finished_all_groups(*args, **kwargs)
        return waits, {**params, DIVISION: self._division} if params else params


def division_of(kv_cache_config: Any, vllm_config: Any) -> str:
    """A name for what each byte of a block holds; other layers, heads, sizes or ranks give another one.

    Args:
        kv_cache_config: vLLM's, with the groups of an engine.
        vllm_config: vLLM's, with the settings of that engine.
    """
    specs = [(group.layer_names, group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
    groups = [(names, spec.block_size, spec.page_size_bytes) for names, spec in specs]
    heads = sorted(Settings.from_config(vllm_config.additional_config).full_heads.items())
    return str(uuid5(NAMESPACE_OID, repr((groups, heads, vllm_config.parallel_config.tensor_parallel_size))))


def is_decoded_elsewhere(request: Request) -> bool:
    """Whether this engine only computes a request's prompt, and another one loads its blocks."""
    return bool((request.kv_transfer_params or {}).get("do_remote_decode"))
