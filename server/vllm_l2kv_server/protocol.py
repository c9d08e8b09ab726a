"""Request bodies of the two endpoints that replace vLLM's, and the answer of `GET /v1/kv_compression`.

The bodies are vLLM's, with 400 where vLLM would answer 500. The `kv_` fields are not declared here: `request_fields`
reads them for all endpoints, and `openapi` shows them.
"""

from typing import Any, Self

from pydantic import BaseModel, ModelWrapValidatorHandler, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import OpenAIBaseModel
from vllm.exceptions import VLLMError, VLLMValidationError

from vllm_l2kv.params import FIELD_NAMES, FieldValue
from vllm_l2kv_server.request_fields import XARGS

MAX_LENGTH_PENALTY = 50
"""A million to this power is still a finite float."""


class CheckedBody(OpenAIBaseModel):
    """A request body of vLLM whose bad values are answered with 400 in place of 500."""

    @model_validator(mode="wrap")
    @classmethod
    def refuse_wrong_types(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Turns other errors, which some of vLLM's checks raise on wrong types, from 500 into 400."""
        try:
            return validate(data)
        except (ValueError, VLLMError):
            raise
        except Exception as error:
            raise VLLMValidationError(f"The body has a value of a wrong type: {error}") from error

    @model_validator(mode="before")
    @classmethod
    def leave_out_null_fields(cls, data: Any) -> Any:
        """Removes null fields from `vllm_xargs`, where vLLM refuses null."""
        xargs = data.get(XARGS) if isinstance(data, dict) else None
        if not isinstance(xargs, dict):
            return data
        given = {name: value for name, value in xargs.items() if value is not None or name not in FIELD_NAMES}
        return {**data, XARGS: given or None}

    @model_validator(mode="after")
    def check_length_penalty(self) -> Self:
        """Bounds it: vLLM's beam search divides by `length ** length_penalty`, which must not be 0 or infinite."""
        penalty = getattr(self, "length_penalty", 1.0)
        if getattr(self, "use_beam_search", False) and not abs(penalty) <= MAX_LENGTH_PENALTY:
            raise VLLMValidationError(
                f"length_penalty must satisfy {-MAX_LENGTH_PENALTY} <= length_penalty <= {MAX_LENGTH_PENALTY}, "
                f"got {penalty}.",
                parameter="length_penalty",
            )
        return self


class CheckedChatCompletionRequest(CheckedBody, ChatCompletionRequest):
    """Body of `POST /v1/chat/completions`."""


class CheckedCompletionRequest(CheckedBody, CompletionRequest):
    """Body of `POST /v1/completions`."""


class FieldInfo(BaseModel):
    """One request field, with this server's default and bounds."""

    name: str
    type: str
    default: FieldValue | None
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
    full_heads: dict[int, list[int]]
    prompt_interval: int
    answer_interval: int
    kv_cache_groups: list[KVCacheGroup]
