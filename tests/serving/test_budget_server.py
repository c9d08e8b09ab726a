"""A server whose context is longer than its cache: budgets, bounds of answers, and requests that can never fit."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from http_server import Server, expected_usage

from vllm_l2kv.policy import Intervals

pytestmark = pytest.mark.slow

MODEL = "SmolLM2-135M-Instruct"
BUDGET = 200
INTERVALS = Intervals(prompt=100, answer=50)
MAX_MODEL_LEN = 2000
NUM_BLOCKS = 19
POOL = 544
"""Tokens of a request that is kept whole: 17 blocks of 32 tokens in compressed layers, 2 of 448 in full ones."""
SENTENCES = " ".join(f"On day {day} the keeper of the lighthouse saw {day * 7 % 11} ships." for day in range(120))
TOO_LARGE = {"kv_max_tokens": 1000}
"""A budget larger than the pool, so it bounds nothing."""
GENERATES = {
    "/v1/chat/completions": ("messages", "max_tokens"),
    "/v1/completions": ("prompt", "max_tokens"),
    "/v1/responses": ("input", "max_output_tokens"),
    "/v1/messages": ("messages", "max_tokens"),
}
"""For each endpoint, the fields of the prompt and of the answer's bound."""
COUNTS = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
"""Names of the counts in `usage`, by API."""


@pytest.fixture(scope="module")
def server(demo_model, tmp_path_factory) -> Iterator[Server]:
    words = f"--max-model-len {MAX_MODEL_LEN} --enforce-eager --dtype float32 --block-size 32"
    words += f" --num-gpu-blocks-override {NUM_BLOCKS + 1}"  # plus vLLM's null block
    words += f" --kv-default-max-tokens {BUDGET}"
    words += f" --kv-prompt-interval {INTERVALS.prompt} --kv-answer-interval {INTERVALS.answer}"
    with Server(tmp_path_factory.mktemp("budgets") / "server.log", *words.split()) as server:
        yield server


@pytest.fixture(scope="module")
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as http:
        yield http


@pytest.fixture(autouse=True)
def lives_on(http) -> Iterator[None]:
    """Checks after each test that no request runs or waits, and that the server answers."""
    yield
    answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "Hello", "max_tokens": 2})
    assert answer.status_code == 200


def body_of(path: str, num_sentences: int, max_tokens: int | None, **fields: Any) -> dict[str, Any]:
    """Returns a request for this endpoint with so much text."""
    place, bound = GENERATES[path]
    text = SENTENCES[: SENTENCES.index(f"On day {num_sentences} ")]
    prompt = [{"role": "user", "content": text}] if place == "messages" else text
    given = {} if max_tokens is None else {bound: max_tokens}
    return {"model": MODEL, place: prompt, "temperature": 0, **given, **fields}


def counts_of(usage: dict[str, Any]) -> tuple[int, int]:
    """Returns the tokens of prompt and answer."""
    prompt, answer = (next(usage[name] for name in names if name in usage) for names in COUNTS)
    return prompt, answer


def numbers_of(usage: dict[str, Any], **params: Any) -> dict[str, int | str]:
    """Returns the expected `usage.kv_cache`, wherever the request found rows of an earlier one."""
    found = usage["kv_cache"].get("found_tokens", 0)
    return expected_usage(*counts_of(usage), INTERVALS, found, **{"max_tokens": BUDGET, **params})


class TestAPromptLargerThanThePool:
    @pytest.mark.parametrize("path", GENERATES)
    def test_is_answered(self, http, path):
        answer = http.post(path, json=body_of(path, 110, 8, ignore_eos=True))
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        assert counts_of(usage)[0] > 3 * POOL
        assert usage["kv_cache"] == numbers_of(usage)
        assert usage["kv_cache"]["compactions"] >= 14

    def test_streams(self, http):
        path = "/v1/chat/completions"
        body = body_of(path, 60, 8, stream=True, stream_options={"include_usage": True}, kv_keep_ratio=0.1)
        lines = http.post(path, json=body).text.splitlines()
        (usage,) = [json.loads(line.removeprefix("data: "))["usage"] for line in lines if '"usage":{' in line]
        assert usage["prompt_tokens"] > POOL
        assert usage["kv_cache"] == numbers_of(usage, keep_ratio=0.1)

    def test_many_at_once(self, http):
        """Without budgets they would need five pools together. Each answer equals that of the request alone."""
        path = "/v1/completions"
        bodies = [body_of(path, 40 + number, 8) for number in range(5)]
        with ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(lambda body: http.post(path, json=body).json(), bodies))
        assert sum(answer["usage"]["prompt_tokens"] for answer in answers) > 5 * POOL
        for answer in answers:
            assert answer["usage"]["kv_cache"] == numbers_of(answer["usage"])
        alone = http.post(path, json=bodies[3]).json()
        assert alone["choices"][0]["text"] == answers[3]["choices"][0]["text"]

    def test_the_text_depends_on_the_budget(self, http):
        path = "/v1/completions"
        texts = {
            http.post(path, json=body_of(path, 20, 16, kv_max_tokens=budget)).json()["choices"][0]["text"]
            for budget in (40, 80, 160)
        }
        assert len(texts) == 3


class TestTheBoundOfAnAnswer:
    """A request without a bound, with a budget that the pool cannot hold, gets what fits."""

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
    def test_is_what_fits(self, http, path):
        answer = http.post(path, json=body_of(path, 34, None, ignore_eos=True, **TOO_LARGE))
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        prompt, generated = counts_of(usage)
        assert usage["kv_cache"] == {**numbers_of(usage, max_tokens=1000), "max_tokens": POOL + 1 - prompt}
        assert 1 < generated <= POOL + 1 - prompt
        if path != "/v1/responses":  # which does not take `ignore_eos`
            assert generated == POOL + 1 - prompt
            assert answer.json()["choices"][0]["finish_reason"] == "length"

    def test_in_a_stream(self, http):
        path = "/v1/chat/completions"
        options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        lines = http.post(path, json=body_of(path, 34, None, **options, **TOO_LARGE)).text.splitlines()
        (usage,) = [json.loads(line.removeprefix("data: "))["usage"] for line in lines if '"usage":{' in line]
        assert usage["kv_cache"]["max_tokens"] == usage["completion_tokens"] == POOL + 1 - usage["prompt_tokens"]

    def test_all_the_rest_counts_as_none(self, http):
        """Completions without a bound have a bound of 16."""
        path = "/v1/completions"
        prompt = body_of(path, 34, None)["prompt"]
        num_tokens = http.post("/tokenize", json={"model": MODEL, "prompt": prompt}).json()["count"]
        body = body_of(path, 34, MAX_MODEL_LEN - num_tokens, ignore_eos=True, **TOO_LARGE)
        usage = http.post(path, json=body).json()["usage"]
        assert usage["kv_cache"]["max_tokens"] == usage["completion_tokens"] == POOL + 1 - num_tokens

    def test_the_smallest_of_several_prompts_is_reported(self, http):
        longer, shorter = (body_of("/v1/chat/completions", number, None)["messages"] for number in (34, 33))
        body = {"model": MODEL, "messages": [longer, shorter], "temperature": 0, "ignore_eos": True, **TOO_LARGE}
        usage = http.post("/v1/chat/completions/batch", json=body).json()["usage"]
        num_tokens = http.post("/tokenize", json={"model": MODEL, "messages": longer}).json()["count"]
        assert usage["kv_cache"]["max_tokens"] == POOL + 1 - num_tokens
        assert usage["completion_tokens"] == 2 * (POOL + 1) - usage["prompt_tokens"]

    def test_a_bound_that_fits_is_unchanged(self, http):
        path = "/v1/completions"
        usage = http.post(path, json=body_of(path, 34, 4, **TOO_LARGE)).json()["usage"]
        assert "max_tokens" not in usage["kv_cache"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", GENERATES)
class TestARequestThatNeverFits:
    """It gets 400 before its answer begins, so it cannot wait for ever."""

    def refusal(self, http, path: str, body: dict[str, Any]) -> tuple[str, str]:
        """Returns field and message of the error; the Anthropic API has the field only in the message."""
        response = http.post(path, json=body)
        assert response.status_code == 400, response.text
        assert response.headers["content-type"] == "application/json"
        message, _, param = response.json()["error"]["message"].rstrip(")").partition(" (parameter=")
        assert response.json()["error"].get("param", param) == param
        return param, message

    def test_by_its_prompt(self, http, path, stream):
        param, message = self.refusal(http, path, body_of(path, 80, 8, stream=stream, **TOO_LARGE))
        assert param == "kv_max_tokens"
        assert message.endswith(f"which has {NUM_BLOCKS}; not even one token of an answer fits. Lower kv_max_tokens.")

    def test_by_its_answer(self, http, path, stream):
        param, message = self.refusal(http, path, body_of(path, 30, 300, stream=stream, vllm_xargs=TOO_LARGE))
        assert param == "max_tokens"
        assert message.endswith("Lower kv_max_tokens, or lower max_tokens.")


def test_the_server_reports_its_settings(http):
    info = http.get("/v1/kv_compression").json()
    assert (info["prompt_interval"], info["answer_interval"]) == INTERVALS
    (default,) = [field["default"] for field in info["fields"] if field["name"] == "kv_max_tokens"]
    assert default == BUDGET


def test_metrics_by_kind_and_budget(server, http):
    before = values(http)
    path = "/v1/completions"
    usage = http.post(path, json=body_of(path, 30, 60, ignore_eos=True)).json()["usage"]
    grown = {name: value - before.get(name, 0) for name, value in values(http).items()}
    kinds = {kind: grown[f"compactions_total{{kind={kind}}}"] for kind in ("ratio", "prompt_budget", "answer_budget")}
    assert kinds["ratio"] == 0
    assert min(kinds["prompt_budget"], kinds["answer_budget"]) > 0
    assert sum(kinds.values()) == usage["kv_cache"]["compactions"]
    evicted = sum(grown[f"rows_evicted_total{{kind={kind}}}"] for kind in kinds)
    assert evicted == usage["kv_cache"]["evicted_tokens"]
    assert grown["request_budget_rows_sum{}"] == BUDGET
    assert grown["e2e_request_latency_seconds_count{budget=256,keep_ratio=1.0}"] == 1


def values(http: httpx.Client) -> dict[str, float]:
    """Returns metrics of vllm-l2kv, named with their labels of kind, ratio and budget."""
    found = {}
    for line in http.get("/metrics").text.splitlines():
        if line.startswith("vllm_l2kv:") and "_bucket" not in line:
            name, _, rest = line.removeprefix("vllm_l2kv:").partition("{")
            labels, _, value = rest.partition("} ")
            kept = [label for label in labels.split(",") if label.startswith(("kind=", "keep_ratio=", "budget="))]
            found[f"{name}{{{','.join(sorted(kept))}}}".replace('"', "")] = float(value)
    return found
