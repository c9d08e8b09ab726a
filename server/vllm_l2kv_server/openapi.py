"""The `kv_` fields in the OpenAPI schema that `/docs` shows, at every endpoint that takes them."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from vllm_l2kv.params import REQUEST_FIELDS
from vllm_l2kv_server.request_fields import GENERATING_PATHS, paths_of


def show_fields(app: FastAPI) -> None:
    """Adds the fields to the schema that the app generates, in the way that FastAPI documents."""
    app.openapi = _with_fields(app.openapi)  # type: ignore[method-assign]


def _with_fields(generate: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    def openapi() -> dict[str, Any]:
        schema = generate()
        for path in GENERATING_PATHS:
            if (body := _body_of(schema, path)) is not None:
                body.setdefault("properties", {}).update(_properties(path))
        return schema

    return openapi


def _properties(path: str) -> dict[str, Any]:
    return {
        field.name: {
            "title": field.name,
            "description": field.description,
            "anyOf": [field.kind.schema(), {"type": "null"}],
        }
        for field in REQUEST_FIELDS
        if path in paths_of(field)
    }


def _body_of(schema: dict[str, Any], path: str) -> dict[str, Any] | None:
    """Returns the schema of an endpoint's JSON body, or `None` if the app has no such endpoint or no schema for it."""
    request = schema["paths"].get(path, {}).get("post", {}).get("requestBody", {})
    reference = request.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref")
    if reference is None:
        return None
    body: dict[str, Any] = schema["components"]["schemas"][reference.rpartition("/")[2]]
    return body
