"""Stands before vLLM's engine client in every handler that generates."""

from typing import Any

from starlette.datastructures import State

from vllm_l2kv.params import CompressionParams, asks_for_compression
from vllm_l2kv_server.protocol import check_fields
from vllm_l2kv_server.usage import current_box, record


class CompressionEngineClient:
    """vLLM's engine client, which also checks our fields and collects their numbers.

    Whatever the endpoint, `SamplingParams.extra_args` pass here last: a bad value gets 400 from every endpoint that
    takes `vllm_xargs`, and the numbers never show as `kv_transfer_params`.
    """

    def __init__(self, client: Any, defaults: CompressionParams) -> None:
        self._client = client
        self._compresses_by_default = defaults.keep_ratio < 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's: returns the async generator of a prompt's outputs.

        Not a generator itself, so that a bad value is told before the answer's status is sent.

        Raises:
            VLLMValidationError: A bad value in `extra_args`.
        """
        extra_args = sampling_params.extra_args
        check_fields(extra_args)
        outputs = self._client.generate(prompt, sampling_params, *args, **kwargs)
        if not (self._compresses_by_default or asks_for_compression(extra_args)):
            return outputs
        box = current_box.get()
        return record(outputs, {} if box is None else box.new_prompt())


def stand_before(client: Any, state: State, defaults: CompressionParams) -> None:
    """Puts ours before `client` in every serving object of the app."""
    ours = CompressionEngineClient(client, defaults)
    for name in state:
        if getattr(state[name], "engine_client", None) is client:
            state[name].engine_client = ours
