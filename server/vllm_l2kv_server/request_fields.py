"""The `kv_` fields of a request body, read from its bytes before vLLM sees it.

vLLM ignores unknown names, so a request with a field that is misspelt, misplaced, given twice or sent to the wrong
endpoint would keep its whole cache without a word. It gets 400 here, on every path. The fields stay in the body: vLLM
copies those in `vllm_xargs` itself, and `context` carries the others to the engine client.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import (
    FIELD_NAMES,
    PREFIX_MESSAGES,
    PREFIX_TOKENS,
    REQUEST_FIELDS,
    Asked,
    Field,
    FieldValue,
    check_names,
    meant_field,
)
from vllm_l2kv.settings import Settings
from vllm_l2kv_server.body import NotJSONError, is_utf8, may_be_unwieldy, parse_body
from vllm_l2kv_server.context import ChatDocument, Compression

XARGS = "vllm_xargs"
TRANSFER = "kv_transfer_params"
TOKENS_PATH = "/inference/v1/generate"
"""This endpoint takes token ids, and `SamplingParams` in place of `vllm_xargs`."""
TOKENS_PLACE = "sampling_params.extra_args"
GENERATING_PATHS = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/invocations",
    TOKENS_PATH,
)
"""Endpoints that generate text and report token usage. They take the fields at the top level of the body."""
CHAT_PATHS = tuple(path for path in GENERATING_PATHS if path not in ("/v1/completions", TOKENS_PATH))
"""Those of them that take messages; `/invocations` is one."""
MESSAGES_OF = {"/v1/messages": ("system", "messages"), "/v1/responses": ("instructions", "input")}
"""Endpoints whose bodies vLLM turns into a chat, with the fields of the first message and of the others."""

FREE_FORM = frozenset({"metadata"})
"""Objects in a body whose keys the client chooses."""

BEAM_SEARCH = "use_beam_search"
MENTIONS_A_FIELD = re.compile(rb'"(\s*kv|use_beam_search")', re.IGNORECASE)
ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")


def parse_if_needed(body: bytes) -> Any:
    """Parses a body if its bytes show that it may hold a field or end the server.

    Args:
        body: In UTF-8, UTF-16 or UTF-32; perhaps not JSON.

    Returns:
        Its JSON value; `None` for a body that need not be parsed, and for one that is not JSON, which the endpoint
        itself refuses.

    Raises:
        VLLMValidationError: Nested too deeply, too many values, a lone surrogate, or a field given twice; answered with
            400.
    """
    if not may_be_unwieldy(body) and not may_give_fields(body):
        return None
    try:
        return parse_body(body, object_pairs_hook=_without_duplicates)
    except NotJSONError:
        return None


def read_compression(body: Any, path: str, settings: Settings) -> Compression | None:
    """Returns what a request asks of the KV cache.

    Args:
        body: The JSON value from `parse_if_needed`.
        path: The endpoint's path, from `path_of`.
        settings: The engine's.

    Returns:
        `None` if the request has no field and is not compressed by default, so that there are no numbers to report.

    Raises:
        VLLMValidationError: A bad value, or a field that would be ignored; answered with 400.
    """
    body = body if isinstance(body, dict) else {}
    given = _fields_of(body, path)
    fields = {name: value for name, value in given.items() if name != PREFIX_MESSAGES.name}
    asked, document = read_fields(fields, settings), _document_of(given, body, path)
    if path not in GENERATING_PATHS or not (asked.reports or document):
        return None
    if not body.get(BEAM_SEARCH):
        return Compression(fields, document)
    # vLLM's beam search makes a new engine request for every token, and none of them lasts until a compaction.
    for param in given:
        raise VLLMValidationError(
            "Beam search generates one token per engine request, so nothing would ever be compressed; "
            f"leave out {BEAM_SEARCH} or {param}.",
            parameter=param,
        )
    return None


def paths_of(field: Field) -> tuple[str, ...]:
    """Returns the endpoints that take a field."""
    return CHAT_PATHS if field.chats_only else GENERATING_PATHS


def may_give_fields(body: bytes) -> bool:
    """Whether the bytes of a body may hold one of the fields.

    A name is visible in the bytes unless ASCII characters are escaped or the encoding is not UTF-8.
    """
    return bool(MENTIONS_A_FIELD.search(body) or ESCAPED_ASCII.search(body) or not is_utf8(body))


def read_fields(values: Mapping[str, Any], settings: Settings) -> Asked:
    """Reads fields as `Settings.read` does, with errors for an HTTP client.

    Raises:
        VLLMValidationError: A bad value, a wrong name for a field, or a scorer that the engine does not offer; answered
            with 400.
    """
    _check_names(values)
    try:
        return settings.read(values)
    except ParamError as error:
        raise bad_request(error) from error


def refuse_elsewhere(values: Mapping[str, Any]) -> None:
    """Refuses the fields where no text is generated, or where its token usage is not reported.

    Raises:
        VLLMValidationError: Answered with 400; names the field and the endpoints that take it.
    """
    for field in REQUEST_FIELDS:
        if values.get(field.name) is not None:
            paths = _listed(paths_of(field))
            raise VLLMValidationError(f"{field.name} works on POST {paths} only.", parameter=field.name)


def bad_request(error: ParamError) -> VLLMValidationError:
    """Returns the error that vLLM's handlers answer with 400 and `param`.

    The value is left out, since the message has it already, shortened. A lone surrogate in a client's field name cannot
    be sent back as UTF-8, so it is escaped.
    """
    message, param = (text.encode("utf-8", "backslashreplace").decode() for text in (str(error), error.param))
    return VLLMValidationError(message, parameter=param)


def _fields_of(body: dict[str, Any], path: str) -> dict[str, FieldValue]:
    place = TOKENS_PLACE if path == TOKENS_PATH else XARGS
    nested = body
    for name in place.split("."):
        nested = _object(nested.get(name))
    _check_names(body)
    _check_names(nested)
    _refuse_misplaced(body, place)
    if path not in GENERATING_PATHS:
        refuse_elsewhere({**nested, **body})
        return {}
    given = {name: _only_value(name, body.get(name), nested.get(name), place) for name in FIELD_NAMES}
    return {name: value for name, value in given.items() if value is not None}


def _document_of(given: Mapping[str, Any], body: Mapping[str, Any], path: str) -> ChatDocument | None:
    """Returns the document of a chat, if the client names it by messages.

    Raises:
        VLLMValidationError: A bad value, an endpoint without messages, or `kv_prefix_tokens` in the same request.
    """
    name = PREFIX_MESSAGES.name
    if name not in given:
        return None
    try:
        num_messages = int(PREFIX_MESSAGES.kind.check(name, given[name]))
    except ParamError as error:
        raise bad_request(error) from error
    if path not in CHAT_PATHS:
        text = f"{name} works on POST {_listed(CHAT_PATHS)} only; give {PREFIX_TOKENS.name} instead."
        raise VLLMValidationError(text, parameter=name)
    if PREFIX_TOKENS.name in given:
        text = f"{name} and {PREFIX_TOKENS.name} both say where the document ends; give one of them."
        raise VLLMValidationError(text, parameter=name)
    if path not in MESSAGES_OF:
        return ChatDocument(num_messages)
    first, others = (body.get(part) for part in MESSAGES_OF[path])
    return ChatDocument(num_messages, bool(first) + (len(others) if isinstance(others, list) else 1))


def _check_names(values: Mapping[str, Any]) -> None:
    """Refuses wrong names for fields, and a wrong type of `kv_transfer_params`, a field of vLLM.

    vLLM does not check that type in `vllm_xargs`, and its engine client would fail.

    Raises:
        VLLMValidationError: Answered with 400.
    """
    try:
        check_names(values)
    except ParamError as error:
        raise bad_request(error) from error
    if not isinstance(values.get(TRANSFER), dict | None):
        raise VLLMValidationError(f"{TRANSFER} must be an object.", parameter=TRANSFER)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _refuse_misplaced(body: dict[str, Any], right: str) -> None:
    """Refuses a field inside any object of the body but `right`, since vLLM would ignore it there."""
    for place, value in body.items():
        if not isinstance(value, dict) or place == right or place in FREE_FORM:
            continue
        for name in value:
            if (field := _field_of(name)) is not None:
                hint = f" {place} is an option of the Python client, not a field." if place == "extra_body" else ""
                raise VLLMValidationError(
                    f"{field} is inside {place}, where it has no effect; put it at the top level of the body, or "
                    f"inside {right}.{hint}",
                    parameter=f"{place}.{name}".encode("utf-8", "backslashreplace").decode(),
                )


def _field_of(name: str) -> str | None:
    """Returns the field that a name in a body is or resembles."""
    return name if name in FIELD_NAMES else meant_field(name)


def _only_value(name: str, at_top: Any, nested: Any, place: str) -> Any:
    """Returns the one value given for a field.

    Raises:
        VLLMValidationError: Both places have a value, and the values differ.
    """
    if at_top is not None and nested is not None and at_top != nested:
        raise VLLMValidationError(
            f"{name} is {at_top} at the top level and {nested} inside {place}; give it once.", parameter=name
        )
    return nested if at_top is None else at_top


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds an object of a body; the last value of a duplicate key counts, as in other JSON parsers.

    Raises:
        VLLMValidationError: The duplicate key is a field, or `vllm_xargs`, which may hold fields.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1 and (name == XARGS or _field_of(name)):
                raise bad_request(ParamError(name, f"{name} is given {count} times in one object; give it once."))
    return value


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
