"""The fields, their numbers and their errors, at every generating endpoint of the real server."""

import json
from typing import Any

import anthropic
import httpx
import openai
import pytest
from http_server import KEY, expected_usage
from usages import together

MODEL = "SmolLM2-135M-Instruct"
TEXT = " ".join(f"On day {day} the keeper of the lighthouse saw {day * 7 % 11} ships." for day in range(12))
MESSAGES = [{"role": "user", "content": f"{TEXT} How many ships did the keeper see on day 3?"}]
CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
ENDPOINTS = {
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/batch": {**CHAT, "messages": [MESSAGES, MESSAGES]},
    "/v1/completions": {"model": MODEL, "prompt": TEXT, "max_tokens": 8, "temperature": 0},
    "/v1/responses": {"model": MODEL, "input": MESSAGES[0]["content"], "max_output_tokens": 8, "temperature": 0},
    "/v1/messages": CHAT,
    "/invocations": CHAT,
}
JSON = {"content-type": "application/json"}
WRONG = {
    "a literal extra_body": {"extra_body": {"kv_keep_ratio": 0.5}},
    "misspelt": {"kv_keep_ration": 0.5},
    "hyphens": {"kv-keep-ratio": 0.5},
    "capitals": {"KV_KEEP_RATIO": 0.5},
    "camel case": {"kvKeepRatio": 0.5},
    "hyphens in xargs": {"vllm_xargs": {"kv-keep-ratio": 0.5}},
    "misspelt in xargs": {"vllm_xargs": {"kv_keep": 0.5}},
    "a bad value": {"kv_keep_ratio": 5},
}


@pytest.fixture(scope="module")
def http(server):
    # uvicorn closes a connection after an error of the app; the next request must not take that for a dead server.
    limits = httpx.Limits(max_keepalive_connections=0)
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=120, limits=limits) as http:
        yield http


def numbers_of(usage: dict, num_prompts: int = 1) -> dict[str, Any]:
    """Returns the expected `usage.kv_cache` at keep ratio 0.5, for equal prompts with equal answers."""
    num_tokens = usage.get("prompt_tokens") or usage.get("input_tokens")
    num_generated = usage.get("completion_tokens") or usage.get("output_tokens")
    one = expected_usage(num_tokens // num_prompts, num_generated // num_prompts, keep_ratio=0.5)
    return together([one] * num_prompts)


@pytest.mark.parametrize("path", ENDPOINTS)
class TestEachEndpoint:
    @pytest.mark.parametrize("fields", [{"kv_keep_ratio": 0.5}, {"vllm_xargs": {"kv_keep_ratio": 0.5}}])
    def test_compresses_and_reports_numbers(self, http, path, fields):
        response = http.post(path, json={**ENDPOINTS[path], **fields})
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        assert usage["kv_cache"] == numbers_of(usage, 2 if path.endswith("batch") else 1)
        assert usage["kv_cache"]["evicted_tokens"] > 80

    def test_nothing_asked(self, http, path):
        usage = http.post(path, json=ENDPOINTS[path]).json()["usage"]
        assert "kv_cache" not in usage

    @pytest.mark.parametrize("fields", WRONG.values(), ids=WRONG)
    def test_refused(self, http, path, fields):
        response = http.post(path, json={**ENDPOINTS[path], **fields})
        assert response.status_code == 400
        assert "kv_keep_ratio" in response.json()["error"]["message"]

    def test_refused_in_other_encodings(self, http, path):
        body = json.dumps({**ENDPOINTS[path], "kv_keep": 0.5})
        for content in (body.encode("utf-16"), body.replace("kv_keep", r"\u006bv_keep").encode()):
            response = http.post(path, content=content, headers=JSON)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "kv_keep"

    def test_refused_twice(self, http, path):
        body = json.dumps(ENDPOINTS[path])[:-1] + ', "kv_keep_ratio": 0.5, "kv_keep_ratio": 0.25}'
        response = http.post(path, content=body, headers=JSON)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "kv_keep_ratio"

    def test_an_escaped_name_works(self, http, path):
        body = json.dumps({**ENDPOINTS[path], "kv_keep_ratio": 0.5}).replace('"kv_keep', r'"\u006bv_keep')
        usage = http.post(path, content=body, headers=JSON).json()["usage"]
        assert usage["kv_cache"]["evicted_tokens"] > 80


class TestStreams:
    def test_responses(self, server):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
            fields = {**ENDPOINTS["/v1/responses"], "extra_body": {"kv_keep_ratio": 0.5}}
            whole = client.responses.create(**fields)
            *_, last = client.responses.create(**fields, stream=True)
        assert last.type == "response.completed"
        assert last.response.output_text == whole.output_text
        for usage in (whole.usage, last.response.usage):
            assert usage.model_extra["kv_cache"] == numbers_of(usage.model_dump())

    def test_messages(self, server):
        with anthropic.Anthropic(base_url=server.url, auth_token=KEY, max_retries=0, timeout=120) as client:
            # This method of the client has no argument `temperature`.
            fields = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8}
            body = {"temperature": 0, "kv_keep_ratio": 0.5}
            whole = client.messages.create(**fields, extra_body=body)
            *_, delta, _stop = client.messages.create(**fields, extra_body=body, stream=True)
            with pytest.raises(anthropic.BadRequestError, match="0 < kv_keep_ratio <= 1"):
                client.messages.create(**fields, extra_body={"kv_keep_ratio": 5})
        expected = numbers_of(whole.usage.model_dump())
        assert whole.usage.model_extra["kv_cache"] == expected
        assert delta.type == "message_delta"
        assert delta.usage.model_extra["kv_cache"] == expected

    def test_invocations(self, http):
        body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}, "kv_keep_ratio": 0.5}
        lines = http.post("/invocations", json=body).text.splitlines()
        (usage,) = [json.loads(line.removeprefix("data: "))["usage"] for line in lines if '"usage":{' in line]
        assert usage["kv_cache"] == numbers_of(usage)


@pytest.mark.parametrize("fields", [{}, {"kv_keep_ratio": 0.5}])
def test_a_slash_at_the_end(http, fields):
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = http.post(f"{path}/", json={**ENDPOINTS[path], **fields}, follow_redirects=True)
        assert response.status_code == 200
        assert ("kv_cache" in response.json()["usage"]) == bool(fields)


@pytest.mark.parametrize("path", ["/tokenize", "/generative_scoring", "/v1/messages/count_tokens", "/v1/systemone"])
def test_endpoints_that_generate_nothing(http, path):
    for fields in ({"kv_keep_ratio": 0.5}, {"vllm_xargs": {"kv_keep_ratio": 0.5}}, {"kv_keep": 0.5}):
        response = http.post(path, json={**ENDPOINTS["/v1/completions"], "messages": MESSAGES, **fields})
        assert response.status_code == 400
        assert "kv_keep_ratio" in response.json()["error"]["message"]


class TestTheEngineLivesOn:
    """Each of these bodies once ended the engine or the connection, before the bytes of bodies were checked."""

    @pytest.fixture(autouse=True)
    def _lives_on(self, http):
        yield
        assert http.get("/health").status_code == 200
        assert http.post("/v1/completions", json=ENDPOINTS["/v1/completions"]).status_code == 200

    @pytest.mark.parametrize(
        "media_type",
        ["Application/JSON", "application/json ; charset=utf-16", "APPLICATION/json;x=y", "text/plain", None],
    )
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
    def test_a_deep_body_without_a_key(self, server, media_type, encoding):
        deep: object = 1
        for _ in range(600):
            deep = {"a": deep}
        body = json.dumps({**CHAT, "kv_transfer_params": deep}).encode(encoding)
        headers = {} if media_type is None else {"content-type": media_type}
        for content in (body, (body[begin : begin + 500] for begin in range(0, len(body), 500))):
            response = httpx.post(f"{server.url}/invocations", content=content, headers=headers, timeout=60)
            assert response.status_code == 400
            assert "too deeply" in response.json()["error"]["message"]

    @pytest.mark.parametrize("path", ["/invocations", "/v1/chat/completions", "/v1/chat/completions/batch"])
    def test_deep_arguments_of_a_tool_call(self, http, path):
        function = {"name": "f", "arguments": "[" * 100_000}
        call = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
        conversation = [*MESSAGES, call, {"role": "tool", "tool_call_id": "c", "content": "1"}]
        messages = [conversation] if path.endswith("batch") else conversation
        response = http.post(path, json={**CHAT, "messages": messages})
        assert response.status_code == 400
        assert "too deeply" in response.json()["error"]["message"]

    def test_deep_arguments_of_a_function_call(self, http):
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "[" * 100_000}
        conversation = [*MESSAGES, call, {"type": "function_call_output", "call_id": "c", "output": "1"}]
        response = http.post("/v1/responses", json={**ENDPOINTS["/v1/responses"], "input": conversation})
        assert response.status_code == 400
        assert "too deeply" in response.json()["error"]["message"]
