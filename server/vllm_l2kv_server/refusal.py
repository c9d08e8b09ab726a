"""The answer to a request that the server refuses before vLLM sees it, in vLLM's format."""

from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError

MESSAGES_PATH = "/v1/messages"


def refusal(error: VLLMError, scope: Scope) -> JSONResponse:
    """Returns the answer to a request with this scope; the error has its status.

    Clients of the Anthropic API expect `type` at the top level of the answer.
    """
    answer = create_error_response(error)
    content: dict[str, Any] = answer.model_dump()
    if path_of(scope).startswith(MESSAGES_PATH):
        content["type"] = "error"
    return JSONResponse(content, status_code=answer.error.code)


def path_of(scope: Scope) -> str:
    """Returns the endpoint's path, without the server's root path and without a slash at the end.

    vLLM's app redirects a path with a slash at the end to the one without.
    """
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).rstrip("/")
