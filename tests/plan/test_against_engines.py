"""The plan beside real engines: blocks of the pool, of a request in each phase, and how many requests run."""

import json
from typing import Any

import pytest
from engine import Engine, greedy, keep, running

from vllm_l2kv.tools.plan import cli

NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 600, 100
CACHE_BYTES = 9 << 20
CASES = {
    "stock": ("llama", None, {}),
    "one group": ("llama", (), {}),
    "two groups": ("llama", (0,), {}),
    "sliding": ("gemma3", (), {}),
    "sliding, full and compressed": ("gemma3", (2,), {"num_blocks": 3}),
    "stock, sliding": ("gemma3", None, {"num_blocks": 3}),
}
BATCH_TOKENS = 512


@pytest.fixture(params=CASES, scope="module")
def case(request, tiny_model):
    kind, full_layers, changes = CASES[request.param]
    model = tiny_model(kind, **changes)
    sizes = {"max_model_len": 1024, "max_num_seqs": 256, "max_num_batched_tokens": BATCH_TOKENS}
    memory = {"kv_cache_memory_bytes": CACHE_BYTES, "num_gpu_blocks_override": None}
    block_size = {"block_size": 128} if full_layers is None else {}  # vLLM's default on a CPU
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_CPU_KVCACHE_SPACE")  # it would win
        with running(model, full_layers, **sizes, **memory, **block_size) as engine:
            yield engine, str(model), full_layers


def plan(capsys, model: str, full_layers: tuple[int, ...] | None) -> dict[str, Any]:
    """What the command says of the engine at hand."""
    words = [f"--context={NUM_PROMPT_TOKENS}", f"--output={NUM_OUTPUT_TOKENS}", "--ratio=0.25", "--protect=0:0"]
    words += [f"--kv-cache-gib={CACHE_BYTES / 2**30}", f"--max-num-batched-tokens={BATCH_TOKENS}"]
    words += [f"--full-layers={','.join(map(str, full_layers or ()))}", "--device=cpu", "--dtype=float32", "--json"]
    cli.plan([model, *words])
    stock, ours = json.loads(capsys.readouterr().out)["engines"]
    return stock if full_layers is None else ours


def params_of(row: dict[str, Any], full_layers: tuple[int, ...] | None) -> Any:
    return greedy(NUM_OUTPUT_TOKENS) if full_layers is None else keep(row["keep_ratio"], num_tokens=NUM_OUTPUT_TOKENS)


def prompt(seed: int) -> list[int]:
    return [(seed * 7919 + i * 31) % 40_000 + 1000 for i in range(NUM_PROMPT_TOKENS)]


def held(engine: Engine, req_id: str) -> int:
    """Blocks that a request holds; null blocks stand where a window left."""
    tables = [manager.req_to_blocks.get(req_id, ()) for manager in engine.managers]
    return sum(not block.is_null for table in tables for block in table)


def test_blocks_of_the_pool(capsys, case):
    engine, model, full_layers = case
    planned = plan(capsys, model, full_layers)
    config = engine.scheduler.kv_cache_config
    assert planned["num_blocks"] == engine.pool.num_gpu_blocks == config.num_blocks
    assert planned["block_bytes"] == config.kv_cache_tensors[0].size // config.num_blocks
    assert [(group["layers"], group["block_size"]) for group in planned["groups"]] == [
        (len(group.layer_names), group.kv_cache_spec.block_size) for group in config.kv_cache_groups
    ]


def test_blocks_of_a_request(capsys, case):
    engine, model, full_layers = case
    planned = plan(capsys, model, full_layers)
    for row in planned["rows"]:
        assert engine.kv_cache_manager.reset_prefix_cache()
        req_id = engine.add("a", prompt(0), params_of(row, full_layers))
        blocks = []
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            blocks.append(held(engine, req_id))
        assert blocks.pop() == 0
        num_chunks = -(-NUM_PROMPT_TOKENS // BATCH_TOKENS)
        whole, answering = max(blocks[:num_chunks]), blocks[num_chunks:]
        assert max(answering) == row["end_blocks"]
        if any(group["kind"] == "sliding" for group in planned["groups"]):
            # What windows hold is bounded, not told exactly.
            assert whole <= row["prompt_blocks"]
            assert answering[0] <= row["compacted_blocks"]
        else:
            assert whole == row["prompt_blocks"]
            assert answering[0] == row["compacted_blocks"]


def test_so_many_run_at_once_without_preemption(capsys, case):
    engine, model, full_layers = case
    for row in plan(capsys, model, full_layers)["rows"]:
        assert engine.kv_cache_manager.reset_prefix_cache()
        for seed in range(row["at_once"]):
            engine.add(f"{seed}", prompt(seed), params_of(row, full_layers))
        requests, most = list(engine.scheduler.requests.values()), 0
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            most = max(most, len(engine.scheduler.running))
        assert most == row["at_once"] > 3
        assert [request.num_preemptions for request in requests] == [0] * most
