"""Bodies of the two endpoints that vllm-l2kv replaces: bad values get 400 where vLLM would answer 500."""

import math

import pytest
from vllm.exceptions import VLLMValidationError
from vllm_l2kv_server.protocol import CheckedChatCompletionRequest, CheckedCompletionRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
COMPLETION = {"model": "m", "prompt": "hello"}


def refused(model, body) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as caught:
        model.model_validate(body)
    return caught.value


@pytest.mark.parametrize(
    ("model", "body"),
    [
        pytest.param(CheckedChatCompletionRequest, CHAT, id="chat"),
        pytest.param(CheckedCompletionRequest, COMPLETION, id="completion"),
    ],
)
class TestBothBodies:
    def test_checks_of_vllm_that_fail_on_a_type(self, model, body):
        assert "wrong type" in str(refused(model, {**body, "structured_outputs": "x"}))

    @pytest.mark.parametrize("penalty", [-51, 1e300, -1e300, math.nan, math.inf])
    def test_length_penalty_of_a_beam_search(self, model, body, penalty):
        fields = {"length_penalty": penalty}
        error = refused(model, {**body, **fields, "use_beam_search": True})
        assert error.parameter == "length_penalty"
        assert "-50 <= length_penalty <= 50" in str(error)
        assert model.model_validate({**body, **fields}).use_beam_search is False

    def test_fields_of_the_middleware_pass(self, model, body):
        request = model.model_validate({**body, "kv_keep_ratio": 0.5, "vllm_xargs": {"kv_protect_last": 4}})
        assert request.to_sampling_params(8, {}).extra_args == {"kv_protect_last": 4}

    def test_null_in_xargs_is_not_given(self, model, body):
        sent = {**body, "vllm_xargs": {"kv_keep_ratio": 0.5, "kv_protect_last": None}}
        assert model.model_validate(sent).vllm_xargs == {"kv_keep_ratio": 0.5}
        assert sent["vllm_xargs"] == {"kv_keep_ratio": 0.5, "kv_protect_last": None}
        with pytest.raises(ValueError, match="vllm_xargs"):
            model.model_validate({**body, "vllm_xargs": {"other": None}})

    @pytest.mark.parametrize("junk", [[], "text", 1, None, {"vllm_xargs": 3}, {"vllm_xargs": [{"kv_keep_ratio": 0.5}]}])
    def test_junk_is_left_to_pydantic(self, model, body, junk):
        with pytest.raises((ValueError, VLLMValidationError)):
            model.model_validate({**body, **junk} if isinstance(junk, dict) else junk)
