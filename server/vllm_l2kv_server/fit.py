"""Refuses a prompt that never fits into the KV cache, or is all document, before the status of its answer is sent.

The scheduler refuses it too, for offline use. On a server its refusal would come after a stream has begun.
"""

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.inputs.preprocess import extract_prompt_len

from vllm_l2kv.capacity import Capacity, DoesNotFitError
from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import CompactionPoints, Intervals


class FitCheck:
    """What one engine can hold.

    Args:
        model_config: vLLM's.
        intervals: The engine's.
        capacity: The engine's.
    """

    def __init__(self, model_config: Any, intervals: Intervals, capacity: Capacity) -> None:
        self._model_config = model_config
        self._intervals = intervals
        self._capacity = capacity

    def check(self, prompt: Any, max_tokens: int | None, params: CompressionParams) -> None:
        """Refuses a prompt that does not fit, or is not longer than its document.

        Args:
            prompt: As vLLM's endpoints give it to the engine client: rendered, so that it has token ids or embeddings.
                The engine checks prompts that come in chunks or as text.
            max_tokens: The bound of its answer; `None` for the rest of the context.
            params: The request's compression parameters.

        Raises:
            VLLMValidationError: Answered with 400; the parameter is the field to change.
        """
        if not isinstance(prompt, dict) or "type" not in prompt:
            return
        num_tokens = extract_prompt_len(self._model_config, prompt)
        rest = self._capacity.max_model_len - num_tokens
        try:
            points = CompactionPoints.of(num_tokens, params, self._intervals)
            self._capacity.max_tokens(num_tokens, rest if max_tokens is None else max_tokens, points)
        except (DoesNotFitError, ParamError) as error:
            raise VLLMValidationError(str(error), parameter=error.param) from error
