"""Request bodies: what is taken, what is refused and in which words, what reaches the engine."""

import json
import math

import pytest
from vllm.exceptions import VLLMValidationError
from vllm_l2kv_server.protocol import (
    CompressibleChatCompletionRequest,
    CompressibleCompletionRequest,
    CompressionFields,
)

from vllm_l2kv.params import FIELD_NAMES

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
COMPLETION = {"model": "m", "prompt": "hello"}
BODIES = [
    pytest.param(CompressibleChatCompletionRequest, CHAT, id="chat"),
    pytest.param(CompressibleCompletionRequest, COMPLETION, id="completion"),
]
BAD_RATIOS = [0, -1, -0.5, 1.0001, 2, math.nan, math.inf, -math.inf, 10**400, "0.5", "", True, False, [], [0.5], {}]
BAD_COUNTS = [-1, 0.5, 1.0, math.nan, math.inf, 2**31, 10**400, "1", True, [], [1], {"a": 1}]
BAD_VALUES = [("kv_keep_ratio", value) for value in BAD_RATIOS] + [
    (name, value) for name in ("kv_protect_first", "kv_protect_last") for value in BAD_COUNTS
]
BAD_VALUES += [(name, value) for name in ("kv_scorer", "kv_granularity") for value in ("", "L2", 1, True, ["l2"], {})]


def refused(model, body) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as caught:
        model.model_validate(body)
    return caught.value


@pytest.mark.parametrize(("model", "body"), BODIES)
class TestBothBodies:
    def test_fields_reach_the_engine(self, model, body):
        given = {"kv_keep_ratio": 0.25, "kv_protect_first": 4, "kv_protect_last": 32}
        given |= {"kv_scorer": "keydiff", "kv_granularity": "block"}
        params = model.model_validate({**body, **given}).to_sampling_params(8, {})
        assert params.extra_args == given
        assert params.max_tokens == 8

    def test_checks_of_vllm_that_stumble_over_a_type(self, model, body):
        assert "wrong type" in str(refused(model, {**body, "structured_outputs": "x"}))

    @pytest.mark.parametrize("penalty", [-51, 1e300, -1e300, math.nan, math.inf])
    def test_length_penalty_of_a_beam_search(self, model, body, penalty):
        fields = {"length_penalty": penalty}
        error = refused(model, {**body, **fields, "use_beam_search": True})
        assert error.parameter == "length_penalty"
        assert "-50 <= length_penalty <= 50" in str(error)
        assert model.model_validate({**body, **fields}).use_beam_search is False

    def test_transfer_params_in_xargs(self, model, body):
        error = refused(model, {**body, "vllm_xargs": {"kv_transfer_params": "x"}})
        assert error.parameter == "kv_transfer_params"

    def test_nothing_asked_nothing_sent(self, model, body):
        assert model.model_validate({**body, "kv_keep_ratio": None}).to_sampling_params(8, {}).extra_args is None

    def test_other_xargs_stay(self, model, body):
        request = model.model_validate({**body, "vllm_xargs": {"other": 1, "kv_keep_ratio": 0.5}})
        assert request.to_sampling_params(8, {}).extra_args == {"other": 1, "kv_keep_ratio": 0.5}
        assert request.vllm_xargs == {"other": 1}

    def test_null_in_xargs_is_not_given(self, model, body):
        request = model.model_validate({**body, "vllm_xargs": {"kv_keep_ratio": 0.5, "kv_protect_last": None}})
        assert request.given_fields() == {"kv_keep_ratio": 0.5}

    def test_the_body_of_the_client_is_not_changed(self, model, body):
        sent = {**body, "vllm_xargs": {"kv_keep_ratio": 0.5}}
        before = json.dumps(sent)
        model.model_validate(sent)
        assert json.dumps(sent) == before

    @pytest.mark.parametrize(("name", "value"), BAD_VALUES)
    @pytest.mark.parametrize("nested", [False, True])
    def test_bad_value(self, model, body, name, value, nested):
        given = {name: value}
        error = refused(model, {**body, "vllm_xargs": given} if nested else {**body, **given})
        assert error.parameter == name
        assert name in str(error)
        assert len(str(error)) < 300

    @pytest.mark.parametrize("nested", [False, True])
    def test_unknown_name(self, model, body, nested):
        given = {"kv_keep_ration": 0.5}
        error = refused(model, {**body, "vllm_xargs": given} if nested else {**body, **given})
        assert error.parameter == "kv_keep_ration"
        assert "did you mean 'kv_keep_ratio'" in str(error)

    def test_name_that_is_not_unicode(self, model, body):
        error = refused(model, {**body, "kv_\ud800": 1})
        assert error.parameter.encode() == rb"kv_\ud800"
        assert str(error).encode()

    def test_names_of_vllm_pass(self, model, body):
        request = model.model_validate({**body, "kv_transfer_params": {"a": 1}})
        assert request.kv_transfer_params == {"a": 1}

    def test_same_value_twice(self, model, body):
        request = model.model_validate({**body, "kv_keep_ratio": 0.5, "vllm_xargs": {"kv_keep_ratio": 0.5}})
        assert request.given_fields() == {"kv_keep_ratio": 0.5}

    def test_two_values(self, model, body):
        error = refused(model, {**body, "kv_keep_ratio": 0.5, "vllm_xargs": {"kv_keep_ratio": 0.25}})
        assert error.parameter == "kv_keep_ratio"
        assert "0.5" in str(error)
        assert "0.25" in str(error)

    def test_beam_search(self, model, body):
        error = refused(model, {**body, "use_beam_search": True, "n": 2, "kv_keep_ratio": 0.5})
        assert error.parameter == "kv_keep_ratio"
        assert "drop use_beam_search" in str(error)
        assert model.model_validate({**body, "use_beam_search": True, "n": 2}).use_beam_search

    @pytest.mark.parametrize("junk", [[], "text", 1, None, {"vllm_xargs": 3}, {"vllm_xargs": [{"kv_keep_ratio": 0.5}]}])
    def test_junk_is_left_to_pydantic(self, model, body, junk):
        with pytest.raises((ValueError, VLLMValidationError)):
            model.model_validate({**body, **junk} if isinstance(junk, dict) else junk)

    def test_schema_shows_the_fields(self, model, body):
        properties = model.model_json_schema()["properties"]
        assert properties["kv_keep_ratio"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
        assert properties["kv_protect_last"]["anyOf"][0]["type"] == "integer"
        assert properties["kv_granularity"]["enum"] == ["token", "block", None]
        assert "always kept" in properties["kv_protect_first"]["description"]


def test_one_declaration_per_field():
    assert tuple(CompressionFields.model_fields) == FIELD_NAMES
