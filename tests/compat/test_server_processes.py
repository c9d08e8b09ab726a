"""Several processes on one port: each must handle the fields, the numbers and the errors."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from http_server import Server, expected_usage
from rules import INTERVALS
from usages import TINY_SHARE

from vllm_l2kv.policy import Intervals

pytestmark = pytest.mark.slow

NUM_REQUESTS = 24


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("--api-server-count", "2"), id="two API servers"),
        pytest.param(("--data-parallel-size", "2"), id="two engines"),
        pytest.param(("--data-parallel-size", "2", "--api-server-count", "2"), id="two of each"),
    ],
)
def server(request, tiny_model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    words = "--served-model-name tiny --dtype float32 --enforce-eager --max-model-len 2048 --kv-full-layers 0"
    words += " --kv-prompt-interval {} --kv-answer-interval {}".format(*INTERVALS)
    with pytest.MonkeyPatch.context() as patch:
        # vLLM needs a NUMA node for each engine, unless threads stay unbound.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        server = Server(log, str(tiny_model("llama")), *words.split(), *request.param)
    with server:
        yield server


def ask(server, text_ids, number: int, **fields) -> httpx.Response:
    """Uses a new connection for each request, so that any process may accept it."""
    body = {
        "model": "tiny",
        "prompt": text_ids[5 * number : 5 * number + 200 + number],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    }
    return httpx.post(f"{server.url}/v1/completions", json={**body, **fields}, timeout=120)


def at_once(call, count: int = NUM_REQUESTS) -> list[httpx.Response]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(call, range(count)))


RULES: list[dict[str, float]] = [
    {"keep_ratio": 1},
    {"keep_ratio": 0.5},
    {"max_tokens": 60},
    {"keep_ratio": 0.25, "max_tokens": 80},
]


def fields_of(number: int) -> dict[str, float]:
    return {f"kv_{name}": value for name, value in RULES[number % 4].items()}


def usage_of(number: int, found: int = 0) -> dict[str, int | str]:
    numbers = expected_usage(200 + number, 8, Intervals(*INTERVALS), found, TINY_SHARE, **RULES[number % 4])
    assert (numbers["compactions"] > 1) is ("max_tokens" in RULES[number % 4])
    return numbers


def test_numbers_and_tokens(server, text_ids, tiny_model, tokenizer):
    from reference import Reference

    reference = Reference(tiny_model("llama"))
    before = server.metrics()
    answers = at_once(lambda number: ask(server, text_ids, number, **fields_of(number)))
    for number, answer in enumerate(answers):
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["usage"]["kv_cache"] == usage_of(number)
        assert body.get("kv_transfer_params") is None
        prompt, rule = text_ids[5 * number : 5 * number + 200 + number], RULES[number % 4]
        ratio, budget = str(rule.get("keep_ratio", 1)), rule.get("max_tokens")
        tokens = reference.generate(prompt, 8, ratio, (0,), budget=budget, intervals=INTERVALS)
        assert body["choices"][0]["text"] == tokenizer.decode(tokens)
    check_metrics(before, server.metrics(), [answer.json()["usage"]["kv_cache"] for answer in answers])


def check_metrics(before, after, usage: list[dict[str, int]]) -> None:
    """Checks that each process answers for all engines and all API processes."""
    num_compactions = sum(numbers["compactions"] for numbers in usage)
    expected = {
        "requests_compressed_total": sum(numbers["compactions"] > 0 for numbers in usage),
        "compactions_total": num_compactions,
        "rows_evicted_total": sum(numbers["evicted_tokens"] for numbers in usage),
        "compaction_kept_rows_count": num_compactions,
        "request_keep_ratio_count": len(usage),
        "request_budget_rows_count": len(usage) // 2,
        "e2e_request_latency_seconds_count": len(usage),
    }
    names = {name: f"vllm_l2kv:{name}" for name in expected}
    assert {name: after[names[name]] - before[names[name]] for name in names} == expected


def test_no_numbers_without_a_field(server, text_ids):
    for answer in at_once(lambda number: ask(server, text_ids, number), 8):
        assert "kv_cache" not in answer.json()["usage"]


def test_streams(server, text_ids):
    """One of the engines has seen each prompt already, and with a budget it may find its rows."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answers = at_once(lambda number: ask(server, text_ids, number, **options, **fields_of(number)))
    for number, answer in enumerate(answers):
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert events[-1] == "[DONE]"
        numbers = json.loads(events[-2])["usage"]["kv_cache"]
        assert numbers == usage_of(number, numbers.get("found_tokens", 0))


def test_errors(server, text_ids):
    bad = [
        ("kv_keep_ratio", {"kv_keep_ratio": 7}),
        ("kv_kep_ratio", {"kv_kep_ratio": 0.5}),
        ("kv_protect_last", {"vllm_xargs": {"kv_protect_last": -1}}),
        ("kv_max_tokens", {"kv_max_tokens": 0}),
        ("kv_scorer", {"kv_max_tokens": 60, "kv_scorer": "lagkv"}),
    ]
    for number, answer in enumerate(at_once(lambda number: ask(server, text_ids, number, **bad[number % 5][1]))):
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].split(".")[-1] == bad[number % 5][0]


def test_the_page_about_compression(server):
    pages = at_once(lambda _: httpx.get(f"{server.url}/v1/kv_compression", timeout=120), 12)
    assert {page.status_code for page in pages} == {200}
    assert len({page.text for page in pages}) == 1
    assert pages[0].json()["full_layers"] == [0]


def test_every_process_answered_requests_and_still_runs(server, request):
    """So the tests above hold for each process."""
    assert server.is_healthy()
    log = server.log.read_text()
    assert "Traceback" not in log
    words = request.node.callspec.params["server"]
    if "--api-server-count" in words:
        assert set(re.findall(r"\((ApiServer_\d+) .*POST /v1/completions", log)) == {"ApiServer_0", "ApiServer_1"}
    if "--data-parallel-size" in words:
        metrics = httpx.get(f"{server.url}/metrics", timeout=120).text
        counts = re.findall(r'vllm:request_success_total\{engine="(\d)".*\} (\S+)', metrics)
        assert {engine for engine, count in counts if float(count) > 0} == {"0", "1"}
