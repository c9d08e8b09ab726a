"""Two ranks in processes of their own, each with its heads: answers and blocks equal those of one rank."""

import random
import re
import sys
from collections import Counter
from typing import Any

import cloudpickle
import pytest
import torch
from engine import keep
from reference import Reference
from vllm import envs

RATIOS = ("1.0", "0.5", "0.25")
COLLECTIVE = re.compile(r"c10d|gloo|nccl|shm_|vllm::(all|reduce|gather)")
"""Names of communication in a profile, of torch and of vLLM."""

# What runs on the ranks goes there whole: they cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def unbound_threads(monkeypatch):
    """Without it vLLM wants a NUMA node for each rank."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Engines that started before made vLLM remember the environment, and this one's is nothing for those to come.
    envs.disable_envs_cache()
    yield
    envs.disable_envs_cache()


@pytest.mark.parametrize(
    ("num_kv_heads", "full_layers"),
    [
        pytest.param(2, (0,), id="one KV head a rank, layer 0 full"),
        pytest.param(1, (), id="replicated, none full"),
        pytest.param(2, (), id="one KV head a rank, none full", marks=pytest.mark.slow),
        pytest.param(1, (0,), id="replicated, layer 0 full", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one(num_kv_heads, full_layers, tiny_model, run, text_ids, unbound_threads):
    model = tiny_model("llama", num_key_value_heads=num_kv_heads)
    prompts = [text_ids[11 * i : 11 * i + 300] for i in range(len(RATIOS))]
    params = [keep(ratio) for ratio in RATIOS]
    answers, blocks = {}, {}
    for num_ranks in (1, 2):
        with run(model, full_layers, tensor_parallel_size=num_ranks) as engine:
            answers[num_ranks] = engine.tokens(prompts, params)
            held = blocks[num_ranks] = []
            for i, prompt in enumerate(prompts):
                req_id = engine.add(str(i), prompt, params[i])
                while engine.scheduler.requests[req_id].num_output_tokens < 3:
                    engine.step()
                held.append(engine.num_blocks(req_id))
                engine.drain()
            engine.check_whole()
            if num_ranks > 1:
                engine.core.shutdown()  # ends the ranks' processes
    reference = Reference(model)
    expected = [reference.generate(p, 12, ratio, full_layers) for p, ratio in zip(prompts, RATIOS, strict=True)]
    assert answers == {1: expected, 2: expected}
    assert blocks[1] == blocks[2]
    compressed = [of_request[-1] for of_request in blocks[1]]
    assert compressed == [10, 5, 3]  # of 32 tokens, for 300, 150 and 75 and two more


@pytest.mark.slow
def test_many_requests_on_two_ranks_which_hold_the_same(tiny_model, run, text_ids, unbound_threads):
    model = tiny_model("llama", num_key_value_heads=2)
    chance = random.Random(1)
    num_requests, num_aborted = 200, 20
    starts = [chance.randrange(2000) for _ in range(num_requests)]
    prompts = [text_ids[start : start + chance.randint(1, 400)] for start in starts]
    ratios = [chance.choice(RATIOS) for _ in prompts]
    looks: Counter[str] = Counter()
    room = {"max_num_seqs": num_requests, "max_num_batched_tokens": 8192, "num_gpu_blocks_override": 3000}
    with run(model, (0,), tensor_parallel_size=2, **room) as engine:
        for i, (prompt, ratio) in enumerate(zip(prompts, ratios, strict=True)):
            engine.add(str(i), prompt, keep(ratio))
        aborted = [str(number) for number in chance.sample(range(num_requests), num_aborted)]
        answers: dict[str, list[int]] = {}
        step = 0
        while engine.llm.llm_engine.has_unfinished_requests():
            step += 1
            if step == 8:
                looks["aborted"] = len([name for name in aborted if name not in answers])
                engine.llm.llm_engine.abort_request(aborted)
            answers |= {o.request_id: list(o.outputs[0].token_ids) for o in engine.step() if o.finished}
            if step % 3 == 0:
                first, second = engine.llm.collective_rpc(state_of_rank)
                assert first == second
                looks["requests"] = max(looks["requests"], len(first["tables"]))
                looks["compacted"] = max(looks["compacted"], len(first["counts"]))
        engine.check_whole()
        engine.core.shutdown()
    assert looks["requests"] > 100, looks
    assert looks["compacted"] > 50, looks
    assert looks["aborted"] > 10, looks
    reference = Reference(model)
    for number, (prompt, ratio) in enumerate(zip(prompts, ratios, strict=True)):
        if str(number) not in aborted:
            assert answers[str(number)] == reference.generate(prompt, 12, ratio, (0,)), f"{len(prompt)} tokens, {ratio}"


@pytest.mark.slow
def test_compaction_adds_no_communication(tiny_model, run, text_ids, unbound_threads):
    model = tiny_model("llama", num_key_value_heads=2)
    prompts = [text_ids[11 * i : 11 * i + 300] for i in range(3)]
    profiles = {}
    for full_layers in (None, (0,)):
        with run(model, full_layers, tensor_parallel_size=2) as engine:
            engine.llm.collective_rpc(start_profile)
            params = [keep("0.5") if full_layers else keep("1.0")] * len(prompts)
            outputs = engine.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
            profiles[full_layers] = engine.llm.collective_rpc(stop_profile)
            if full_layers:
                assert all(output.kv_transfer_params["kv_cache"]["evicted_tokens"] == 150 for output in outputs)
            engine.core.shutdown()
    stock, ours = profiles[None], profiles[(0,)]
    assert sum(stock[0].values()) > 12, stock  # at least one for each token
    assert ours == stock


def state_of_rank(worker: Any) -> dict[str, Any]:
    """Evicted counts, and block tables by group, of every request in a rank's batch."""
    batch = worker.model_runner.input_batch
    tables = {
        req_id: [
            table.block_table.np[row, : table.num_blocks_per_row[row]].tolist()
            for table in batch.block_table.block_tables
        ]
        for req_id, row in batch.req_id_to_index.items()
    }
    return {"tables": tables, "counts": dict(worker._runner.counts._num_evicted)}


def start_profile(worker: Any) -> None:
    """Notes every operator that a rank runs."""
    worker.profile_of_test = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    worker.profile_of_test.start()


def stop_profile(worker: Any) -> dict[str, int]:
    """How often a rank communicated, by the name of the operation."""
    worker.profile_of_test.stop()
    events = worker.profile_of_test.key_averages()
    return {event.key: event.count for event in events if COLLECTIVE.search(event.key)}
