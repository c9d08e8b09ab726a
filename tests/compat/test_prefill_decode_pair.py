"""A prefill/decode pair over HTTP, as a router uses it: one server computes prompts, the other one loads and decodes.

Needs the package nixl. Blocks travel by UCX between two processes of this machine.
"""

import json
from collections.abc import Iterator

import httpx
import pytest
from http_server import Server, free_port

pytest.importorskip("nixl")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

CONNECTOR = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
WORDS = ("--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager", "--kv-prompt-interval", "100")
REMOTE = {"do_remote_decode": True, "do_remote_prefill": False}
RATIO, BUDGET = {"kv_keep_ratio": 0.5}, {"kv_max_tokens": 150}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[tuple[Server, Server]]:
    """The prefilling and the decoding server; each has a port for handshakes, and a core, since their workers poll."""
    folder, environment = tmp_path_factory.mktemp("pair"), pytest.MonkeyPatch()
    servers = []
    for core, name in enumerate(("prefill", "decode")):
        environment.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", str(core))
        servers.append(Server(folder / f"{name}.log", "--kv-transfer-config", json.dumps(CONNECTOR), *WORDS))
    environment.undo()
    with servers[0] as prefilling, servers[1] as decoding:
        yield prefilling, decoding


def complete(server: Server, prompt: list[int], num_tokens: int, **fields) -> dict:
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **fields}
    response = httpx.post(f"{server.url}/v1/completions", json={**body, "return_token_ids": True}, timeout=300)
    assert response.status_code == 200, response.text
    return response.json()


def through(pair, prompt: list[int], change=lambda params: params, **fields) -> tuple[dict, dict, float]:
    """Answers of both servers to a request, and how many tokens the second one loaded."""
    before = pair[1].metrics()["vllm:external_prefix_cache_hits_total"]
    first = complete(pair[0], prompt, 1, kv_transfer_params=REMOTE, **fields)
    second = complete(pair[1], prompt, 12, kv_transfer_params=change(first["kv_transfer_params"]), **fields)
    return first, second, pair[1].metrics()["vllm:external_prefix_cache_hits_total"] - before


def tokens_of(answer: dict) -> list[int]:
    return answer["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("begin", "length", "fields"),
    [(0, 33, RATIO), (100, 700, {}), (1000, 700, RATIO), (2000, 500, {"kv_keep_ratio": 0.2, "kv_protect_last": 8})],
    ids=str,
)
def test_a_prompt_is_loaded_whole_and_compacted_at_its_end(pair, text_ids, begin, length, fields):
    """Blocks hold 32 tokens, those of full layers 448. vLLM computes the last token again."""
    prompt = text_ids[begin : begin + length]
    first, second, num_loaded = through(pair, prompt, **fields)
    assert num_loaded == length
    alone = complete(pair[0], prompt, 12, **fields)
    assert tokens_of(second) == tokens_of(alone)
    assert tokens_of(second)[:1] == tokens_of(first)
    if fields:
        assert second["usage"]["kv_cache"] == alone["usage"]["kv_cache"]
        assert first["usage"]["kv_cache"]["evicted_tokens"] == 0 < second["usage"]["kv_cache"]["evicted_tokens"]
        assert first["usage"]["kv_cache"]["reason"].startswith("Another engine decodes the answer")


@pytest.mark.parametrize("fields", [BUDGET, {**RATIO, "kv_prefix_tokens": 200}], ids=str)
def test_what_is_compacted_inside_the_prompt_is_computed_by_the_decoding_server(pair, text_ids, fields):
    """The prefilling server must not compact either: it would send kept rows as if they were the whole prompt."""
    prompt = text_ids[2500:3100]
    first, second, num_loaded = through(pair, prompt, **fields)
    assert (num_loaded, first["usage"]["kv_cache"]["evicted_tokens"]) == (0, 0)
    assert tokens_of(second) == tokens_of(complete(pair[0], prompt, 12, **fields))
    assert second["usage"]["kv_cache"]["evicted_tokens"] >= 100


def test_a_second_question_loads_what_is_missing(pair, text_ids):
    prompt = text_ids[3200:3700]
    through(pair, prompt, **RATIO)
    _, second, num_loaded = through(pair, prompt + text_ids[:100], **RATIO)
    assert num_loaded == 600 - 448  # a hit inside a block of full layers is given up for the load
    assert tokens_of(second) == tokens_of(complete(pair[0], prompt + text_ids[:100], 12, **RATIO))


def test_blocks_of_another_division_are_not_loaded(pair, text_ids):
    prompt = text_ids[800:1000]
    _, second, num_loaded = through(pair, prompt, lambda params: {**params, "l2kv_division": "another"}, **RATIO)
    assert num_loaded == 0
    assert tokens_of(second) == tokens_of(complete(pair[0], prompt, 12, **RATIO))
    assert "computes its prompt itself" in pair[1].log.read_text()
