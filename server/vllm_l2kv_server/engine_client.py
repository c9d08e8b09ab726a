"""What compression adds to two methods of vLLM's engine client, `generate` and `shutdown`."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import PREFIX_MESSAGES, PREFIX_TOKENS, Asked, CompressionParams
from vllm_l2kv.settings import Settings
from vllm_l2kv_server.chat_document import end_of_document
from vllm_l2kv_server.context import Compression, current
from vllm_l2kv_server.fit import FitCheck
from vllm_l2kv_server.metrics import RequestMetrics
from vllm_l2kv_server.request_fields import bad_request, read_fields, refuse_elsewhere
from vllm_l2kv_server.usage import record


class EngineCalls:
    """Gives the engine the fields of a request, collects its numbers, and ends waiting requests at a shutdown.

    The `SamplingParams` of every endpoint pass through here. The fields that the middleware has read are added to them;
    a field that came another way, such as in a form, is refused. Clients never see the numbers as `kv_transfer_params`.

    Args:
        client: vLLM's engine client.
        settings: The engine's.
        fit: Refuses prompts that the KV cache cannot hold.
        metrics: Measures requests, if there are metrics.

    Attributes:
        was_shut_down: Whether the server shut the engine down. If not, an engine that ended did so by itself.
    """

    def __init__(
        self,
        client: Any,
        settings: Settings,
        fit: FitCheck,
        metrics: RequestMetrics | None = None,
    ) -> None:
        self._client = client
        self._generate = client.generate
        self._shutdown = client.shutdown
        self._settings = settings
        self._fit = fit
        self._metrics = metrics
        self.was_shut_down = False

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns vLLM's async generator of a prompt's outputs.

        A plain function, so that an error is raised before the status of the answer is sent.

        Raises:
            VLLMValidationError: As for `check`.
        """
        asked = self.check(prompt, sampling_params)
        outputs = self._generate(prompt, sampling_params, *args, **kwargs)
        if sampling_params.structured_outputs is not None:
            outputs = report_grammar_error(outputs)
        if self._metrics is not None:
            # Streaming input is kept whole, see `params.check_session`.
            params = CompressionParams() if isinstance(prompt, AsyncGenerator) else asked.params
            outputs = self._metrics.observe(outputs, params)
        if not asked.reports:
            return outputs
        compression = current.get()
        return record(outputs, {} if compression is None else compression.box.new_prompt())

    def check(self, prompt: Any, sampling_params: Any) -> Asked:
        """Adds the fields of the HTTP request to a prompt's `SamplingParams`, and returns what the prompt asks for.

        Raises:
            VLLMValidationError: A bad value in `extra_args`, a field at an endpoint that reports no numbers, a
                prompt that the KV cache can never hold, or a document whose end is not found.
        """
        compression = current.get()
        extra_args = sampling_params.extra_args or {}
        if compression is not None and (compression.fields or compression.document):
            sampling_params.extra_args = extra_args = _with_fields(extra_args, prompt, compression)
        asked = read_fields(extra_args, self._settings)
        if compression is None:
            refuse_elsewhere(extra_args)
        self._fit.check(prompt, sampling_params.max_tokens, asked.params)
        return asked

    def shutdown(self, timeout: float | None = None) -> None:
        """Shuts the engine down, then ends the requests that wait for it.

        The API server calls this in a thread when a signal stops it. vLLM cancels its output handler, often before the
        handler has reported that the engine is gone. The waiting requests, and uvicorn with them, would then never end.
        """
        self.was_shut_down = True
        self._shutdown(timeout=timeout)
        handler = self._client.output_handler
        # vLLM shuts its client down again when it deletes the client, perhaps after the loop has closed.
        if handler is not None and not handler.get_loop().is_closed():
            end_requests = self._client.output_processor.propagate_error
            handler.get_loop().call_soon_threadsafe(end_requests, self._client.dead_error)


def _with_fields(extra_args: dict[str, Any], prompt: Any, compression: Compression) -> dict[str, Any]:
    """Returns a prompt's `extra_args` with the fields of its HTTP request.

    Raises:
        VLLMValidationError: The end of the document is not found.
    """
    fields = {**extra_args, **compression.fields}
    if compression.document is not None:
        fields.pop(PREFIX_MESSAGES.name, None)  # vLLM has copied it from vllm_xargs
        try:
            fields[PREFIX_TOKENS.name] = end_of_document(prompt)
        except ParamError as error:
            raise bad_request(error) from error
    return fields


async def report_grammar_error(outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yields the outputs of a request with a grammar; an output that ends in an error means a bad grammar.

    vLLM checks a grammar's syntax before it accepts a request, but compiles it in the engine core. If that fails, or
    the grammar accepts no token at all, the core reports "error" without a reason, and vLLM would answer 500.

    Raises:
        VLLMValidationError: Answered with 400.
    """
    async with aclosing(outputs):  # type: ignore[type-var]
        async for output in outputs:
            if any(choice.finish_reason == "error" for choice in output.outputs):
                raise VLLMValidationError(
                    "The engine cannot compile the grammar that the output must follow (response_format, "
                    "structured_outputs, or parameters of tools); simplify it."
                )
            yield output


def wrap_engine_client(
    client: Any, settings: Settings, fit: FitCheck, metrics: RequestMetrics | None = None
) -> EngineCalls:
    """Sets `generate` and `shutdown` of this client to those of `EngineCalls`.

    The methods are set on the one instance that the app and all its serving objects share. A wrapper object would have
    to replace it in each of them, and would not be the `AsyncLLM` that `POST /abort_requests` requires.
    """
    calls = EngineCalls(client, settings, fit, metrics)
    client.generate, client.shutdown = calls.generate, calls.shutdown
    return calls


def check_before_status(responses: Any, calls: EngineCalls) -> None:
    """Lets vLLM's Responses API check a prompt before it begins its answer, as the other endpoints do.

    vLLM calls the engine inside a generator, which a stream starts after it has sent the status and two events.

    Args:
        responses: vLLM's object that serves the endpoint.
        calls: Checks the prompts.
    """
    generate = responses._generate_with_builtin_tools

    def check_and_generate(request_id: str, engine_input: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        calls.check(engine_input, sampling_params)
        return generate(request_id, engine_input, sampling_params, *args, **kwargs)

    responses._generate_with_builtin_tools = check_and_generate
