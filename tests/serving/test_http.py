"""The real server process, driven by the `openai` client."""

import json

import httpx
import openai
import pytest
from http_bodies import BAD_FIELDS, malformed
from http_server import KEY, expected_usage
from usages import together

from vllm_l2kv.params import CompressionParams

MODEL = "SmolLM2-135M-Instruct"
TEXT = " ".join(f"On day {day} the keeper of the lighthouse saw {day * 7 % 11} ships." for day in range(12))
MESSAGES = [{"role": "user", "content": f"{TEXT} How many ships did the keeper see on day 3?"}]
GOOD = {
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4},
    "/v1/completions": {"model": MODEL, "prompt": "Hello, my name is", "max_tokens": 4},
}
PATHS = sorted(GOOD)
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 8}
LONG = {"ignore_eos": True}
"""An answer of the maximum length."""


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as http:
        yield http


def kv_cache(usage) -> dict[str, int] | None:
    return (usage.model_extra or {}).get("kv_cache")


def expected_of(usage, **params) -> dict[str, int | str]:
    """Returns the expected `usage.kv_cache` of one prompt with one answer."""
    return expected_usage(usage.prompt_tokens, usage.completion_tokens, **params)


def post(http, path: str, **fields) -> httpx.Response:
    body = json.dumps({**GOOD[path], **fields})  # httpx refuses NaN
    return http.post(path, content=body, headers={"content-type": "application/json"})


class TestUsage:
    def test_chat(self, client):
        answer = client.chat.completions.create(**GREEDY, messages=MESSAGES, extra_body={"kv_keep_ratio": 0.5})
        assert answer.usage.prompt_tokens > 200
        assert kv_cache(answer.usage) == expected_of(answer.usage, keep_ratio=0.5)
        assert answer.choices[0].message.content
        assert answer.model_extra.get("kv_transfer_params") is None

    def test_completion_with_all_fields(self, client):
        fields = {"kv_keep_ratio": 0.1, "kv_protect_first": 40, "kv_protect_last": 80}
        answer = client.completions.create(**GREEDY, prompt=TEXT, extra_body=fields)
        numbers = kv_cache(answer.usage)
        assert numbers == expected_of(answer.usage, keep_ratio=0.1, protect_first=40, protect_last=80)
        assert numbers["kept_tokens"] == 120 + 7

    @pytest.mark.parametrize("other", [{"kv_scorer": "l2_high"}, {"kv_granularity": "block"}])
    def test_another_choice_of_tokens(self, client, other):
        fields = {"kv_keep_ratio": 0.3, "kv_protect_last": 32}
        ours, theirs = (
            client.completions.create(**GREEDY, prompt=TEXT, extra_body=body) for body in (fields, fields | other)
        )
        assert kv_cache(ours.usage) == kv_cache(theirs.usage)
        assert ours.choices[0].text != theirs.choices[0].text

    def test_compression_changes_no_token_count(self, client):
        plain, half = (
            client.completions.create(**GREEDY, prompt=TEXT, extra_body=fields)
            for fields in ({}, {"kv_keep_ratio": 0.5})
        )
        assert plain.usage.prompt_tokens == half.usage.prompt_tokens
        assert plain.usage.completion_tokens == half.usage.completion_tokens == 8

    def test_absent_without_a_field(self, client):
        answer = client.chat.completions.create(**GREEDY, messages=MESSAGES, extra_body={"kv_keep_ratio": None})
        assert kv_cache(answer.usage) is None
        assert kv_cache(client.completions.create(**GREEDY, prompt=TEXT).usage) is None

    def test_ratio_of_one_keeps_everything_and_reports_it(self, client):
        answer = client.completions.create(**GREEDY, prompt=TEXT, extra_body={"kv_keep_ratio": 1})
        assert kv_cache(answer.usage) == expected_of(answer.usage)
        assert answer.choices[0].text == client.completions.create(**GREEDY, prompt=TEXT).choices[0].text

    def test_one_token_ends_before_compaction(self, client):
        answer = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=1, extra_body={"kv_keep_ratio": 0.5})
        assert kv_cache(answer.usage) == expected_usage(answer.usage.prompt_tokens, 1, keep_ratio=0.5)

    def test_choices_share_a_prompt(self, client):
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=8, n=3, seed=1, extra_body={**LONG, "kv_keep_ratio": 0.25}
        )
        assert len(answer.choices) == 3
        assert kv_cache(answer.usage) == expected_usage(answer.usage.prompt_tokens, 8, keep_ratio=0.25)

    def test_prompts_add_up(self, client):
        prompts = [TEXT, TEXT[:700], "A short one, of a few words only."]
        lengths = [client.completions.create(**GREEDY, prompt=prompt).usage.prompt_tokens for prompt in prompts]
        answer = client.completions.create(
            model=MODEL, prompt=prompts, max_tokens=8, n=2, extra_body={**LONG, "kv_keep_ratio": 0.3}
        )
        each = [expected_usage(length, 8, keep_ratio=0.3) for length in lengths]
        assert len(answer.choices) == 6
        assert kv_cache(answer.usage) == together(each)

    def test_xargs(self, client):
        fields = {"vllm_xargs": {"kv_keep_ratio": 0.25, "kv_protect_last": None}}
        answer = client.chat.completions.create(**GREEDY, messages=MESSAGES, extra_body=fields)
        assert kv_cache(answer.usage) == expected_of(answer.usage, keep_ratio=0.25)


class TestStream:
    @pytest.mark.parametrize("n", [1, 2])
    def test_chat(self, client, n):
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=MESSAGES,
                max_tokens=8,
                n=n,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={**LONG, "kv_keep_ratio": 0.5},
            )
        )
        with_usage = [chunk.usage for chunk in chunks if chunk.usage]
        assert len(with_usage) == 1
        assert chunks[-1].usage is with_usage[0]
        assert kv_cache(with_usage[0]) == expected_usage(with_usage[0].prompt_tokens, 8, keep_ratio=0.5)
        assert {choice.index for chunk in chunks for choice in chunk.choices} == set(range(n))

    def test_completion_prompts(self, client):
        chunks = list(
            client.completions.create(
                **GREEDY,
                prompt=[TEXT, TEXT],
                stream=True,
                stream_options={"include_usage": True},
                extra_body={**LONG, "kv_keep_ratio": 0.5},
            )
        )
        usage = chunks[-1].usage
        one = expected_usage(usage.prompt_tokens // 2, 8, keep_ratio=0.5)
        assert kv_cache(usage) == together([one] * 2)

    def test_same_text_as_without_streaming(self, client):
        fields = {**GREEDY, "prompt": TEXT, "extra_body": {"kv_keep_ratio": 0.5}}
        whole = client.completions.create(**fields).choices[0].text
        chunks = list(client.completions.create(**fields, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole
        assert not any(chunk.usage for chunk in chunks)

    def test_a_stop_string_ends_with_numbers(self, client):
        fields = {"model": MODEL, "prompt": TEXT, "temperature": 0, "extra_body": {"kv_keep_ratio": 0.5}}
        text = client.completions.create(**fields, max_tokens=12).choices[0].text
        chunks = list(
            client.completions.create(
                **fields, max_tokens=100, stop=text[-6:], stream=True, stream_options={"include_usage": True}
            )
        )
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
        usage = chunks[-1].usage
        assert usage.completion_tokens <= 12
        assert kv_cache(usage) == expected_of(usage, keep_ratio=0.5)

    def test_absent_without_a_field(self, client):
        chunks = list(
            client.completions.create(**GREEDY, prompt=TEXT, stream=True, stream_options={"include_usage": True})
        )
        assert chunks[-1].usage.completion_tokens == 8
        assert kv_cache(chunks[-1].usage) is None

    def test_leaving_early_frees_the_request(self, client, http):
        stream = client.completions.create(
            model=MODEL,
            prompt=TEXT,
            max_tokens=2000,
            stream=True,
            extra_body={"kv_keep_ratio": 0.5, "ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
        answer = client.completions.create(**GREEDY, prompt=TEXT, extra_body={"kv_keep_ratio": 0.5})
        assert kv_cache(answer.usage) == expected_of(answer.usage, keep_ratio=0.5)
        running = [line for line in http.get("/metrics").text.splitlines() if "num_requests_running{" in line]
        assert [float(line.split()[-1]) for line in running] == [0]


class TestBadRequests:
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("nested", [False, True])
    def test_bad_values(self, http, path, nested):
        for name, value in BAD_FIELDS:
            given = {name: value}
            response = post(http, path, **({"vllm_xargs": given} if nested else given))
            assert response.status_code == 400, (name, value)
            error = response.json()["error"]
            assert (error["param"], error["code"]) == (name, 400), (name, value)
            assert name in error["message"]

    def test_openai_client_sees_the_field(self, client):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**GREEDY, messages=MESSAGES, extra_body={"kv_keep_ratio": 1.5})
        assert caught.value.param == "kv_keep_ratio"
        assert "0 < kv_keep_ratio <= 1" in caught.value.message

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("nested", [False, True])
    def test_unknown_name(self, http, path, nested):
        given = {"kv_keep_rate": 0.5}
        response = post(http, path, **({"vllm_xargs": given} if nested else given))
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "kv_keep_rate"
        assert "'kv_keep_ratio'" in error["message"]

    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize(
        ("param", "others"),
        [
            ("kv_max_tokens", {"kv_protect_first": 4, "kv_protect_last": 400}),
            ("kv_scorer", {"kv_scorer": "lagkv"}),
            ("kv_scorer", {"kv_scorer": "random"}),
            ("kv_granularity", {"kv_granularity": "block"}),
        ],
    )
    def test_what_excludes_a_budget(self, http, nested, param, others):
        given = {"kv_max_tokens": 403, **others}
        response = post(http, "/v1/completions", **({"vllm_xargs": given} if nested else given), stream=True)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == param
        assert error["message"].startswith(f"{param} ")
        assert "kv_max_tokens" in error["message"]

    def test_two_values(self, http):
        response = post(http, "/v1/completions", kv_keep_ratio=0.5, vllm_xargs={"kv_keep_ratio": 0.25})
        assert response.status_code == 400
        assert "give it once" in response.json()["error"]["message"]

    def test_beam_search(self, http):
        response = post(http, "/v1/completions", kv_keep_ratio=0.5, use_beam_search=True, n=2)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "kv_keep_ratio"

    def test_malformed_bodies_then_a_good_one(self, http, client):
        taken = [
            (path, body[:200], response.status_code, response.text[:200])
            for path, body in malformed(GOOD, 200)
            if not 400
            <= (response := http.post(path, content=body, headers={"content-type": "application/json"})).status_code
            < 500
        ]
        assert taken == []
        answer = client.chat.completions.create(**GREEDY, messages=MESSAGES, extra_body={"kv_keep_ratio": 0.5})
        assert kv_cache(answer.usage) == expected_of(answer.usage, keep_ratio=0.5)


class TestTheRestOfVLLM:
    def test_models(self, client):
        assert [model.id for model in client.models.list()] == [MODEL]

    def test_health_and_metrics(self, http):
        assert http.get("/health").status_code == 200
        assert "vllm:num_requests_running" in http.get("/metrics").text

    def test_metrics_of_compression(self, server, client):
        before = server.metrics()
        answer = client.completions.create(**GREEDY, prompt=TEXT, extra_body={"kv_keep_ratio": 0.4})
        client.completions.create(**GREEDY, prompt=TEXT)
        after = server.metrics()
        grown = {name.removeprefix("vllm_l2kv:"): after[name] - before[name] for name in after}
        assert grown["requests_compressed_total"] == 1
        assert grown["compactions_total"] == kv_cache(answer.usage)["compactions"] == 1
        assert grown["rows_evicted_total"] == kv_cache(answer.usage)["evicted_tokens"]
        assert grown["rows_kept_total"] == answer.usage.prompt_tokens - grown["rows_evicted_total"]
        assert grown["compaction_device_seconds_count"] == 1
        assert grown["compaction_device_seconds_sum"] > 0
        assert grown["blocks_taken_total"] > 0
        assert grown["request_keep_ratio_count"] == 2
        assert grown["request_keep_ratio_sum"] == pytest.approx(1.4)
        assert after["vllm_l2kv:logical_tokens"] == after["vllm_l2kv:physical_tokens"] == 0

    def test_tokenize(self, http, client):
        tokens = http.post("/tokenize", json={"model": MODEL, "prompt": TEXT}).json()
        assert tokens["count"] == client.completions.create(**GREEDY, prompt=TEXT).usage.prompt_tokens

    def test_logprobs(self, client):
        answer = client.chat.completions.create(
            **GREEDY, messages=MESSAGES, logprobs=True, top_logprobs=2, extra_body={"kv_keep_ratio": 0.5}
        )
        content = answer.choices[0].logprobs.content
        assert len(content) == answer.usage.completion_tokens
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in content)
        assert kv_cache(answer.usage)["evicted_tokens"] > 0

    def test_structured_output(self, client):
        schema = {
            "type": "object",
            "properties": {"ships": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["ships"],
            "additionalProperties": False,
        }
        answer = client.chat.completions.create(
            **{**GREEDY, "max_tokens": 40},
            messages=MESSAGES,
            response_format={"type": "json_schema", "json_schema": {"name": "ships", "schema": schema}},
            extra_body={"kv_keep_ratio": 0.5},
        )
        assert isinstance(json.loads(answer.choices[0].message.content)["ships"], int)
        assert kv_cache(answer.usage)["evicted_tokens"] > 0

    def test_tools(self, client):
        function = {
            "name": "count_ships",
            "strict": True,
            "parameters": {"type": "object", "properties": {"day": {"type": "boolean"}}, "required": ["day"]},
        }
        answer = client.chat.completions.create(
            **{**GREEDY, "max_tokens": 60},
            messages=MESSAGES,
            tools=[{"type": "function", "function": function}],
            tool_choice={"type": "function", "function": {"name": "count_ships"}},
            extra_body={"kv_keep_ratio": 0.5},
        )
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "count_ships"
        assert isinstance(json.loads(call.function.arguments)["day"], bool)
        assert kv_cache(answer.usage)["evicted_tokens"] > 0

    def test_responses(self, client):
        xargs = {"vllm_xargs": {"kv_keep_ratio": 0.5}}
        answer = client.responses.create(model=MODEL, input=TEXT, max_output_tokens=4, extra_body=xargs)
        assert answer.usage.output_tokens == 4


class TestOwnRoute:
    def test_describes_the_server(self, http):
        info = http.get("/v1/kv_compression").json()
        assert info["models"] == [MODEL]
        bare_rule = CompressionParams(protect_first=0, protect_last=0)
        assert {field["name"]: field["default"] for field in info["fields"]} == {
            **bare_rule.as_fields(),
            "kv_prefix_messages": None,
        }
        assert all(field["bounds"] and field["description"] and field["type"] for field in info["fields"])
        assert info["full_layers"] == [0, 1]
        full, compressed = sorted(info["kv_cache_groups"], key=lambda group: group["compressed"])
        assert (full["compressed"], compressed["compressed"]) == (False, True)
        assert (len(full["layers"]), len(compressed["layers"])) == (2, 28)
        assert full["block_size"] > compressed["block_size"] > 0

    def test_needs_the_key(self, server):
        assert httpx.get(f"{server.url}/v1/kv_compression").status_code == 401

    def test_openapi_shows_the_fields(self, http):
        spec = http.get("/openapi.json").json()
        assert "/v1/kv_compression" in spec["paths"]
        for path in PATHS:
            content = spec["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            name = content["schema"]["$ref"].rsplit("/", 1)[-1]
            properties = spec["components"]["schemas"][name]["properties"]
            assert properties["kv_keep_ratio"]["anyOf"][0]["maximum"] == 1
            assert {"kv_protect_first", "kv_protect_last"} <= properties.keys()


def test_snippet_is_printed_without_the_key(server):
    log = server.log.read_text()
    assert f"curl {server.url.replace('127.0.0.1', 'localhost')}/v1/chat/completions" in log
    assert f'"model": "{MODEL}"' in log
    assert KEY not in log
