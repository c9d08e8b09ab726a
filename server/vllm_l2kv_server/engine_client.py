"""Stands before vLLM's engine client in every handler that generates."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.datastructures import State
from vllm.exceptions import VLLMValidationError

from vllm_l2kv.params import CompressionParams
from vllm_l2kv_server.context import current
from vllm_l2kv_server.metrics import RequestMetrics
from vllm_l2kv_server.request_fields import read_fields, refuse_elsewhere
from vllm_l2kv_server.usage import record


class CompressionEngineClient:
    """vLLM's engine client, which also gives the engine the fields of a request and collects their numbers.

    The `SamplingParams` of every endpoint pass here last. The fields that the middleware read are added to them, and a
    field that came another way, such as a form, is refused. The numbers never show as `kv_transfer_params`.
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

        Not a generator itself, so that an error precedes the answer's status.

        Raises:
            VLLMValidationError: A bad value in `extra_args`, or a field at an endpoint that reports no numbers.
        """
        compression = current.get()
        extra_args = sampling_params.extra_args or {}
        if compression is not None and compression.fields:
            sampling_params.extra_args = extra_args = {**extra_args, **compression.fields}
        asked = read_fields(extra_args, self._defaults)
        if compression is None:
            refuse_elsewhere(extra_args)
        outputs = self._client.generate(prompt, sampling_params, *args, **kwargs)
        if sampling_params.structured_outputs is not None:
            outputs = blame_grammar(outputs)
        if self._metrics is not None:
            # Streaming input is kept whole, see `params.check_session`.
            keep_ratio = 1.0 if isinstance(prompt, AsyncGenerator) else asked.params.keep_ratio
            outputs = self._metrics.observe(outputs, keep_ratio)
        if not asked.reports:
            return outputs
        return record(outputs, {} if compression is None else compression.box.new_prompt())

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
