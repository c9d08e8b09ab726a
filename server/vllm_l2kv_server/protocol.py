"""The bodies of the two endpoints that compress: vLLM's, with our fields declared and checked."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import OpenAIBaseModel
from vllm.exceptions import VLLMError, VLLMValidationError

from vllm_l2kv.params import (
    FIELD_NAMES,
    FIELDS,
    GRANULARITIES,
    MAX_TOKENS,
    SCORERS,
    CompressionParams,
    FieldValue,
    ParamError,
    asks_for_compression,
)

XARGS = "vllm_xargs"
TRANSFER = "kv_transfer_params"
MAX_LENGTH_PENALTY = 50
"""A million to this power is a float still."""

DESCRIPTIONS = {field.name: field.description for field in FIELDS}


def bad_request(error: ParamError) -> VLLMValidationError:
    """The error for which vLLM's handlers answer 400 with `param`.

    Without the value: it stands in the message already, cut to a length that can be shown. A lone surrogate in a
    client's field name cannot be sent back as UTF-8, so it is escaped.
    """
    message, param = (text.encode("utf-8", "backslashreplace").decode() for text in (str(error), error.param))
    return VLLMValidationError(message, parameter=param)


def check_fields(values: Mapping[str, Any] | None) -> None:
    """Refuses bad values of `kv_` fields and unknown `kv_` names, wherever in a request they stand.

    Raises:
        VLLMValidationError: Answered with 400.
    """
    values = values or {}
    try:
        CompressionParams().override(values)
    except ParamError as error:
        raise bad_request(error) from error
    # vLLM's own name with our prefix. In `vllm_xargs` nothing checks its type before the engine's client stumbles.
    if not isinstance(values.get(TRANSFER), dict | None):
        raise VLLMValidationError(f"{TRANSFER} must be an object.", parameter=TRANSFER)


class CompressionFields(OpenAIBaseModel):
    """What both bodies share: the fields, their checks, and their way to the engine."""

    kv_keep_ratio: float | None = Field(default=None, gt=0, le=1, description=DESCRIPTIONS["kv_keep_ratio"])
    kv_protect_first: int | None = Field(
        default=None, ge=0, le=MAX_TOKENS, description=DESCRIPTIONS["kv_protect_first"]
    )
    kv_protect_last: int | None = Field(default=None, ge=0, le=MAX_TOKENS, description=DESCRIPTIONS["kv_protect_last"])
    kv_scorer: str | None = Field(
        default=None, description=DESCRIPTIONS["kv_scorer"], json_schema_extra={"enum": [*SCORERS, None]}
    )
    kv_granularity: str | None = Field(
        default=None, description=DESCRIPTIONS["kv_granularity"], json_schema_extra={"enum": [*GRANULARITIES, None]}
    )

    @model_validator(mode="before")
    @classmethod
    def check_and_lift(cls, data: Any) -> Any:
        """Checks what the client wrote, before pydantic turns `true` into 1 and `"0.5"` into 0.5.

        Fields inside `vllm_xargs` are lifted to the top level, so that from here on there is one place to look.
        """
        if not isinstance(data, dict):
            return data
        xargs = data.get(XARGS)
        nested = xargs if isinstance(xargs, dict) else {}
        check_fields(data)
        check_fields(nested)
        if not any(name in nested for name in FIELD_NAMES):
            return data
        return {
            **data,
            **{name: _only_value(name, data.get(name), nested.get(name)) for name in FIELD_NAMES},
            XARGS: {key: value for key, value in nested.items() if key not in FIELD_NAMES} or None,
        }

    @model_validator(mode="wrap")
    @classmethod
    def blame_the_body(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Some checks of vLLM stumble over values of a wrong type, which would be answered with 500."""
        try:
            return validate(data)
        except (ValueError, VLLMError):
            raise
        except Exception as error:
            raise VLLMValidationError(f"The body has a value of a wrong type: {error}") from error

    @model_validator(mode="after")
    def refuse_beam_search(self) -> "CompressionFields":
        """vLLM's beam search makes a new engine request for every token, so no request lives to be compacted."""
        if getattr(self, "use_beam_search", False) and (given := self.given_fields()):
            param = next(iter(given))
            raise VLLMValidationError(
                "Beam search generates one token per engine request, so nothing would ever be compressed; "
                f"drop use_beam_search or {param}.",
                parameter=param,
            )
        return self

    @model_validator(mode="after")
    def check_length_penalty(self) -> "CompressionFields":
        """vLLM's beam search divides by `length ** length_penalty`, which must be neither 0 nor infinite."""
        penalty = getattr(self, "length_penalty", 1.0)
        if getattr(self, "use_beam_search", False) and not abs(penalty) <= MAX_LENGTH_PENALTY:
            raise VLLMValidationError(
                f"length_penalty must satisfy {-MAX_LENGTH_PENALTY} <= length_penalty <= {MAX_LENGTH_PENALTY}, "
                f"got {penalty}.",
                parameter="length_penalty",
            )
        return self

    def given_fields(self) -> dict[str, FieldValue]:
        """Our fields that the client gave."""
        fields = {name: getattr(self, name) for name in FIELD_NAMES}
        return {name: value for name, value in fields.items() if value is not None}

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, with our fields where the scheduler looks for them."""
        sampling_params = super().to_sampling_params(*args, **kwargs)
        given = self.given_fields()
        if asks_for_compression(given):
            sampling_params.extra_args = {**(sampling_params.extra_args or {}), **given}
        return sampling_params


def _only_value(name: str, at_top: Any, in_xargs: Any) -> Any:
    """The one value given for a field.

    Raises:
        VLLMValidationError: Two places, two values.
    """
    if at_top is not None and in_xargs is not None and at_top != in_xargs:
        raise VLLMValidationError(
            f"{name} is {at_top} at the top level and {in_xargs} inside {XARGS}; give it once.", parameter=name
        )
    return in_xargs if at_top is None else at_top


class CompressibleChatCompletionRequest(CompressionFields, ChatCompletionRequest):
    """Body of `POST /v1/chat/completions`."""


class CompressibleCompletionRequest(CompressionFields, CompletionRequest):
    """Body of `POST /v1/completions`."""


class FieldInfo(BaseModel):
    """One request field, as this server takes it."""

    name: str
    type: str
    default: FieldValue
    bounds: str
    description: str


class KVCacheGroup(BaseModel):
    """Layers that share a block table."""

    layers: list[str]
    block_size: int
    compressed: bool
    sliding_window: int | None = None


class KVCompressionInfo(BaseModel):
    """Answer of `GET /v1/kv_compression`."""

    models: list[str]
    fields: list[FieldInfo]
    full_layers: list[int]
    kv_cache_groups: list[KVCacheGroup]
