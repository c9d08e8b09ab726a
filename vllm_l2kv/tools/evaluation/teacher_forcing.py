"""Teacher forcing in a real engine: a request generates given tokens.

vLLM reports log-probabilities before logits processors run, so the loss of a forced token is that of the model. There
is one class for each of vLLM's two interfaces.
"""

from functools import partial
from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor, LogitsProcRequestState

FORCED = "forced_token_ids"
"""Key of `SamplingParams.extra_args`."""


class ForcedTokens(AdapterLogitsProcessor):
    """Logits processor for runner V1."""

    def is_argmax_invariant(self) -> bool:
        """False, so that greedy requests are forced too."""
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        """The processor of one request; `None` if it has no forced tokens."""
        forced = (params.extra_args or {}).get(FORCED)
        return partial(_force, forced) if forced else None


class ForcedTokensV2(LogitsProcessor):
    """Logits processor for runner V2 without speculative decoding: one row of logits for each request."""

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        self._num_prompt_tokens = req_states.prompt_len.np
        self._forced: dict[int, list[int]] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Stores the forced tokens of the request that gets this slot."""
        self._forced[req_idx] = (sampling_params.extra_args or {}).get(FORCED, [])
        return bool(self._forced[req_idx])

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Forces the next token of each request that has forced tokens."""
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            if forced := self._forced.get(slot):
                index = int(ctx.seq_lens_upper_bound_np[row] - self._num_prompt_tokens[slot])
                # vLLM also samples for a prompt that is not complete yet, and discards that token.
                logits[row] = _only(forced[max(index, 0)], logits[row])
        return logits


def _force(forced: list[int], output_token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return _only(forced[len(output_token_ids)], logits)


def _only(token_id: int, logits: torch.Tensor) -> torch.Tensor:
    row = torch.full_like(logits, -torch.inf)
    row[token_id] = 0
    return row
