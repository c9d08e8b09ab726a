"""The routes of the endpoint plugin: middleware for every route of vLLM, checked bodies, `GET /v1/kv_compression`."""

import asyncio
from argparse import Namespace
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.datastructures import State
from starlette.responses import Response
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import VLLMValidationError

from vllm_l2kv.capacity import Capacity
from vllm_l2kv.field_kinds import Choice
from vllm_l2kv.params import REQUEST_FIELDS
from vllm_l2kv.settings import Settings
from vllm_l2kv_server.body import CheckedBodyRoute
from vllm_l2kv_server.body_bound import BodyBoundMiddleware
from vllm_l2kv_server.chat_document import find_documents
from vllm_l2kv_server.engine_client import check_before_status, wrap_engine_client
from vllm_l2kv_server.fit import FitCheck
from vllm_l2kv_server.last_line import Outcome
from vllm_l2kv_server.metrics import add_metrics
from vllm_l2kv_server.middleware import CompressionMiddleware
from vllm_l2kv_server.openapi import show_fields
from vllm_l2kv_server.playground import add_playground, has_playground
from vllm_l2kv_server.protocol import (
    CheckedChatCompletionRequest,
    CheckedCompletionRequest,
    FieldInfo,
    KVCacheGroup,
    KVCompressionInfo,
)
from vllm_l2kv_server.refusal import refusal
from vllm_l2kv_server.serve_options import DEFAULT_MAX_BODY_MIB
from vllm_l2kv_server.shutdown import bounded_shutdown
from vllm_l2kv_server.welcome import announce_when_ready

ERRORS = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.NOT_IMPLEMENTED,
)
GENERATES: dict[str, Any] = {
    "dependencies": [Depends(validate_json_request)],
    "response_model": None,
    "responses": {
        HTTPStatus.OK.value: {"content": {"text/event-stream": {}}},
        **{status.value: {"model": ErrorResponse} for status in ERRORS},
    },
}
router = APIRouter(route_class=CheckedBodyRoute, lifespan=bounded_shutdown)


def add_routes(app: FastAPI) -> None:
    """Adds the routes; each replaces vLLM's route of the same path and method, as vLLM documents."""
    app.include_router(router)
    if has_playground(app.state.args):
        add_playground(app)
    show_fields(app)
    app.add_exception_handler(RecursionError, refuse_deep_text)
    app.add_middleware(CompressionMiddleware)
    # The middleware added last runs first. Both run after the check of the API key, so no body is read before it.
    # `vllm serve` has no --max-body-mib.
    max_mib = getattr(app.state.args, "max_body_mib", DEFAULT_MAX_BODY_MIB)
    app.add_middleware(BodyBoundMiddleware, max_mib=max_mib)


async def connect(engine_client: Any, state: State, args: Namespace) -> None:
    """Asks the engine for its KV-cache groups and its capacity, and wraps its client.

    Raises:
        RuntimeError: The engine runs without the worker of vllm-l2kv, so the fields would be ignored.
    """
    config = engine_client.vllm_config
    settings = Settings.from_config(config.additional_config)
    try:
        of_ranks, (capacity, *_) = [
            await engine_client.collective_rpc(method) for method in ("kv_cache_groups", "kv_capacity")
        ]
    except Exception as error:
        raise RuntimeError(
            "VLLM_PLUGINS names l2kv, but this engine has no worker of vllm-l2kv: start with `vllm-l2kv serve`, "
            "or pass --scheduler-cls and --worker-cls, or take l2kv out of VLLM_PLUGINS."
        ) from error
    models = [path.name for path in state.openai_serving_models.base_model_paths]
    state.kv_compression = _describe(models, settings, groups_of(of_ranks))
    state.kv_settings = settings
    # One item for each response that vLLM stores; vLLM never deletes a response.
    responses = getattr(state, "openai_serving_responses", None)
    state.kv_stored_numbers = {} if getattr(responses, "enable_store", False) else None
    fit = FitCheck(config.model_config, settings.intervals, Capacity.from_plain(capacity))
    calls = wrap_engine_client(engine_client, settings, fit, add_metrics(engine_client, settings))
    state.kv_engine_calls = calls
    find_documents(engine_client.renderer)
    if responses is not None:
        check_before_status(responses, calls)
    # `vllm serve` sets no outcome.
    state.kv_outcome = getattr(args, "outcome", None) or Outcome()
    if config.parallel_config._api_process_rank == 0:
        # The state keeps a reference, without which the task could be garbage-collected while it waits.
        state.kv_announcement = asyncio.create_task(announce_when_ready(state, args, models[0]))


@router.post("/v1/chat/completions", **GENERATES)
async def create_chat_completion(request: CheckedChatCompletionRequest, raw_request: Request) -> Any:
    """OpenAI's chat completions; `kv_` fields compress the KV cache of this request."""
    return await chat.create_chat_completion(request, raw_request)


@router.post("/v1/completions", **GENERATES)
async def create_completion(request: CheckedCompletionRequest, raw_request: Request) -> Any:
    """OpenAI's completions; `kv_` fields compress the KV cache of this request."""
    return await completion.create_completion(request, raw_request)


@router.get("/v1/kv_compression")
async def show_kv_compression(raw_request: Request) -> KVCompressionInfo:
    """This server's request fields with defaults and bounds, full layers, intervals, KV-cache groups and models."""
    info: KVCompressionInfo = raw_request.app.state.kv_compression
    return info


async def refuse_deep_text(request: Request, error: Exception) -> Response:
    """Answers 400 if JSON inside a string, such as the arguments of a tool call, is too deep for vLLM to parse."""
    text = "A string in the body holds JSON, such as the arguments of a tool call, that is nested too deeply."
    return refusal(VLLMValidationError(text), request.scope)


def groups_of(ranks: Iterable[Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns the engine's KV-cache groups, merged over its ranks: pipeline ranks hold different layers of each."""
    return [
        {**of_group[0], "layers": list(dict.fromkeys(name for group in of_group for name in group["layers"]))}
        for of_group in zip(*ranks, strict=True)
    ]


def _describe(models: list[str], settings: Settings, groups: list[dict[str, Any]]) -> KVCompressionInfo:
    defaults = settings.defaults.as_fields()
    narrower = {"kv_scorer": Choice(settings.scorers).bounds("kv_scorer")}
    return KVCompressionInfo(
        models=models,
        fields=[
            FieldInfo(
                name=field.name,
                type=field.type,
                default=defaults.get(field.name),
                bounds=narrower.get(field.name, field.bounds),
                description=field.description,
            )
            for field in REQUEST_FIELDS
        ],
        full_layers=list(settings.full_layers),
        full_heads={layer: list(heads) for layer, heads in settings.full_heads.items()},
        prompt_interval=settings.prompt_interval,
        answer_interval=settings.answer_interval,
        kv_cache_groups=[KVCacheGroup(**group) for group in groups],
    )
