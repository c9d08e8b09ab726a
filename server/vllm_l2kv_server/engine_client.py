"""Stands before vLLM's engine client in every handler that generates."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.datastructures import State
from vllm.exceptions import VLLMValidationError

from vllm_l2kv.params import CompressionParams, asks_for_compression
from vllm_l2kv_server.metrics import RequestMetrics
from vllm_l2kv_server.protocol import check_fields
from vllm_l2kv_server.usage import current_box, record


class CompressionEngineClient:
    """vLLM's engine client, which also checks our fields and collects their numbers.

    Whatever the endpoint, `SamplingParams.extra_args` pass here last: a bad value gets 400 from every endpoint that
    takes `vllm_xargs`, and the numbers never show as `kv_transfer_params`.
    """

    def __init__(self, client: Any, defaults: CompressionParams, metrics: RequestMetrics | None = None) -> None:
        self._client = client
        self._defaults = defaults
        self._metrics = metrics
        self.told_to_stop = False
        """Whether the server was told to stop, in contrast to an engine that ended by itself."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Some routes of vLLM ask whether the app's client is an `AsyncLLM`."""
        return type(self._client)

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
        if sampling_params.structured_outputs is not None:
            outputs = blame_grammar(outputs)
        if self._metrics is not None:
            outputs = self._metrics.observe(outputs, self._defaults.override(extra_args or {}).keep_ratio)
        if not (self._defaults.keep_ratio < 1 or asks_for_compression(extra_args)):
            return outputs
        box = current_box.get()
        return record(outputs, {} if box is None else box.new_prompt())

    def shutdown(self, timeout: float | None = None) -> None:
        """As vLLM's; the API server calls it when it is told to stop, and only then, in a thread.

        vLLM cancels its output handler, often before that could tell those who wait for it that the engine is gone;
        they, and uvicorn with them, would wait for ever.
        """
        self.told_to_stop = True
        self._client.shutdown(timeout=timeout)
        handler = self._client.output_handler
        if handler is not None:
            tell_requests = self._client.output_processor.propagate_error
            handler.get_loop().call_soon_threadsafe(tell_requests, self._client.dead_error)


async def blame_grammar(outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Passes the outputs of a structured request on; where they end with an error, its grammar is at fault.

    vLLM checks a grammar's syntax before it takes a request, but compiles it in the engine core. If that fails, or the
    grammar accepts no token at all, the core only says "error", which would be answered with 500.

    Raises:
        VLLMValidationError: Answered with 400.
    """
    async with aclosing(outputs):  # type: ignore[type-var]
        async for output in outputs:
            if any(choice.finish_reason == "error" for choice in output.outputs):
                raise VLLMValidationError(
                    "The engine can make nothing of what the output must look like (response_format, "
                    "structured_outputs, or parameters of tools); simplify it."
                )
            yield output


def stand_before(client: Any, state: State, defaults: CompressionParams, metrics: RequestMetrics | None = None) -> None:
    """Puts ours before `client` in the app and in every serving object of it."""
    ours = CompressionEngineClient(client, defaults, metrics)
    state.engine_client = ours
    for name in state:
        if getattr(state[name], "engine_client", None) is client:
            state[name].engine_client = ours
