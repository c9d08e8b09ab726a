"""Hundreds of clients that come and go, in a cache too small for them: no answer is lost, doubled or mixed up, and
afterwards the server is as empty as before. `make soak` sends thousands of requests.
"""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import churn
import httpx
import pytest
from churn import Mix
from http_server import Server
from load import kill

# vLLM starts only if a request of --max-model-len fits: 11 + 32 blocks and the null block.
NUM_BLOCKS = 49
OPTIONS = (
    "--served-model-name tiny --dtype float32 --enforce-eager --kv-full-layers 0 --scheduling-policy priority "
    # So few that prefill is always chunked. Kernels also allocate memory for every new number of tokens in a step, so
    # memory grows until all numbers have occurred; if they are few, that is soon.
    "--max-num-batched-tokens 128 "
    f"--max-model-len 1024 --max-num-seqs 16 --num-gpu-blocks-override {NUM_BLOCKS} "
    f"--kv-prompt-interval {churn.INTERVALS.prompt} --kv-answer-interval {churn.INTERVALS.answer}"
)
# A request holds most before its compaction, 2 + 6 blocks, and needs up to 5 more for it: five requests never wait.
CALM = Mix(concurrency=3, prompt_lengths=(1, 150), seed=1)
REMEMBERED = Mix(concurrency=4, prompt_lengths=(230, 262), alike=1, documents=0.5, budgets=0.6, seed=8)
"""Most requests leave rows that others can find: prompts so long have the same last compaction by each budget."""
PHASES = {
    "all lengths": Mix(seed=2),
    # vLLM admits every request whose prompt fits. So many short prompts and long answers cause constant preemption.
    "long answers": Mix(prompt_lengths=(1, 60), answer_lengths=(80, 200), seed=3),
    "clients that leave": Mix(cut_off=0.5, seed=4),
    "documents and conversations": REMEMBERED,
    "priorities": Mix(prompt_lengths=(100, 600), priorities=range(-2, 3), cut_off=0.1, seed=5),
}
NUM_AGAIN = 40
LEAK_MIB = 40
"""Room for a run of this test alone, in which new numbers of tokens still occur; docs/reliability.md has the growth
after the tests above.
"""


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("churn") / "server.log", str(llama), *OPTIONS.split()) as server:
        yield server


@pytest.fixture(autouse=True)
def comes_to_rest(server):
    """Checks that each test leaves nothing in the server."""
    yield
    churn.wait_until_idle(server)
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
    log = server.log.read_text()
    assert "Traceback" not in log
    assert " 500 Internal" not in log


@pytest.fixture
def ask(server, text_ids, measured):
    def ask(mix: Mix, num_requests: int) -> list[churn.Answer]:
        """Returns answers that have been checked."""
        begin, num_preemptions = time.monotonic(), churn.num_preemptions(server)
        answers = churn.ask_all(server.url, churn.make_requests(mix, num_requests, text_ids), mix.concurrency)
        seconds, num_preemptions = time.monotonic() - begin, churn.num_preemptions(server) - num_preemptions
        churn.check_answers(answers)
        found = {
            "requests": len(answers),
            "seconds": seconds,
            "preemptions": num_preemptions,
            "complete": sum(answer.is_complete for answer in answers),
            "mib": churn.resident_mib(server).total(),
        }
        print(found)
        measured(**found)
        return answers

    return ask


def test_answers_without_preemption_equal_those_of_each_request_alone(server, ask, num_requests):
    before = churn.num_preemptions(server)
    answers = ask(CALM, num_requests // 2)
    assert churn.num_preemptions(server) == before
    assert sum(answer.is_compressed for answer in answers) > len(answers) / 3
    assert any(answer.num_compactions > 1 for answer in answers)
    churn.check_again(server.url, answers)


@pytest.mark.parametrize("name", PHASES)
def test_every_client_that_stays_has_one_answer(server, ask, num_requests, name):
    before = churn.num_preemptions(server)
    num_requests = num_requests // 2 if name == "long answers" else num_requests
    answers = ask(PHASES[name], num_requests)
    if name == "long answers":
        assert churn.num_preemptions(server) >= before + num_requests / 10
    if PHASES[name] is REMEMBERED:
        found = Counter("kv_prefix_tokens" in answer.request.body for answer in answers if answer.num_found)
        print(f"{found[True]} found documents, {found[False]} found conversations")
        assert found[True] > 1
        assert found[False] > 1
    if PHASES[name].cut_off:
        assert any(not answer.is_complete for answer in answers)
        assert any(answer.events and not answer.is_complete for answer in answers), "some client leaves early"
    churn.wait_until_idle(server)
    # An answer depends on its request alone, not on preemptions of itself or others.
    churn.check_again(server.url, [answer for answer in answers if answer.is_complete][:NUM_AGAIN])


def test_memory_does_not_grow(server, ask, num_requests):
    ask(Mix(cut_off=0.2, seed=6), num_requests)
    before = churn.resident_mib(server)
    ask(Mix(cut_off=0.2, seed=7), num_requests)
    after = churn.resident_mib(server)
    assert after.total() < before.total() + LEAK_MIB, (before, after)


@pytest.mark.slow
def test_a_server_killed_under_load_answers_the_same_after_a_restart(llama, text_ids, tmp_path):
    """Compressed documents end with the process and are compressed again. Uses its own server."""
    requests = churn.make_requests(REMEMBERED, 140, text_ids)
    words = [str(llama), *OPTIONS.split()]
    with Server(tmp_path / "before.log", *words) as server, ThreadPoolExecutor(1) as pool:
        before = churn.ask_all(server.url, requests, REMEMBERED.concurrency)
        churn.check_answers(before)
        assert any(answer.num_found for answer in before)
        load = pool.submit(churn.ask_all, server.url, requests * 10, REMEMBERED.concurrency)
        while server.metrics()["vllm:num_requests_running"] < 3:
            assert not load.done(), load.result()
        kill(server)
        with pytest.raises(httpx.TransportError):
            load.result()
    with Server(tmp_path / "after.log", *words) as server:
        # Each prompt begins elsewhere, so none can find rows of another.
        firsts = list({tuple(request.body["prompt"][:40]): request for request in requests}.values())
        assert not any(answer.num_found for answer in churn.ask_all(server.url, firsts, 1))
        after = churn.ask_all(server.url, requests, REMEMBERED.concurrency)
        churn.check_answers(after)
        assert any(answer.num_found for answer in after)
        assert [answer.token_ids for answer in after] == [answer.token_ids for answer in before]
