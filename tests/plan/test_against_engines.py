"""The plan compared with real engines: blocks of the pool, of a request in each phase, and running requests."""

import json
from statistics import fmean
from typing import Any

import pytest
from engine import Engine, bare_rule, greedy, running

from vllm_l2kv import compression
from vllm_l2kv.tools.plan import cli

pytestmark = pytest.mark.engine

NUM_DOCUMENT_TOKENS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 560, 600, 100
INTERVALS = {"prompt_interval": 128, "answer_interval": 40}
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
    ours = {"block_size": 128}  # stock vLLM's default on a CPU
    if full_layers is not None:
        ours = bare_rule(full_layers=full_layers, **INTERVALS)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_CPU_KVCACHE_SPACE")  # it would override the option
        with running(model, full_layers, **sizes, **memory, **ours) as engine:
            yield engine, str(model), full_layers


def plan(capsys, model: str, full_layers: tuple[int, ...] | None) -> dict[str, Any]:
    """Returns the command's plan for the engine."""
    words = [f"--context={NUM_PROMPT_TOKENS}", f"--output={NUM_OUTPUT_TOKENS}", "--ratio=0.25", "--protect=0:0"]
    words += [f"--kv-cache-gib={CACHE_BYTES / 2**30}", f"--max-num-batched-tokens={BATCH_TOKENS}"]
    words += [f"--document-tokens={NUM_DOCUMENT_TOKENS}"]
    words += [f"--full-layers={','.join(map(str, full_layers or ()))}", "--device=cpu", "--dtype=float32", "--json"]
    # The answer holds at most 217 + 40 rows, one more than eight blocks of 32 hold.
    words += ["--budgets=217,500", *(f"--{name.replace('_', '-')}={rows}" for name, rows in INTERVALS.items())]
    cli.plan([model, *words])
    stock, ours = json.loads(capsys.readouterr().out)["engines"]
    return stock if full_layers is None else ours


def params_of(row: dict[str, Any], full_layers: tuple[int, ...] | None) -> Any:
    if full_layers is None:
        return greedy(NUM_OUTPUT_TOKENS)
    return greedy(NUM_OUTPUT_TOKENS, compression(row["keep_ratio"], max_tokens=row["max_tokens"]))


def prompt(seed: int) -> list[int]:
    return [(seed * 7919 + i * 31) % 40_000 + 1000 for i in range(NUM_PROMPT_TOKENS)]


def held(engine: Engine, req_id: str) -> int:
    """Returns the number of blocks that a request holds; null blocks replace those before a window."""
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
        # The last chunk of the prompt and every later step give a token; after the last one nothing is held.
        num_chunks = len(blocks) - (NUM_OUTPUT_TOKENS - 2)
        whole, answering = max(blocks[:num_chunks]), blocks[num_chunks:]
        assert max(answering) == row["answer_blocks"]
        if any(group["kind"] == "sliding" for group in planned["groups"]):
            # For windows the plan is a bound, not an exact number.
            assert whole <= row["prompt_blocks"]
            assert answering[0] <= row["compacted_blocks"]
        else:
            assert whole == row["prompt_blocks"]
            assert answering[0] == row["compacted_blocks"]
            assert fmean(answering) == pytest.approx(row["mean_blocks"], abs=0.5)


def test_the_planned_number_runs_without_preemption(capsys, case):
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


def test_the_planned_number_of_documents_stays_findable(capsys, case):
    """The last of many documents, each warmed up by a request of one token; stock vLLM has ordinary prefixes."""
    engine, model, full_layers = case
    planned = plan(capsys, model, full_layers)
    for row in planned["rows"]:
        is_compressed = row["document_rows"] < NUM_DOCUMENT_TOKENS
        has_windows = any(group["kind"] == "sliding" for group in planned["groups"])
        assert (row["documents"] is None) == (has_windows and not is_compressed)
        if row["documents"] is None:
            continue
        assert engine.kv_cache_manager.reset_prefix_cache()
        params = params_of(row, full_layers).clone()
        params.max_tokens = 1
        if full_layers is not None:
            params.extra_args["kv_prefix_tokens"] = NUM_DOCUMENT_TOKENS
        prompts = [[*prompt(seed)[:NUM_DOCUMENT_TOKENS], 1] for seed in range(2 * row["documents"])]
        for order in (prompts, prompts[::-1]):
            found = [engine.generate([each], [params])[0].num_cached_tokens for each in order]
        whole = max(found)
        assert NUM_DOCUMENT_TOKENS - planned["groups"][0]["block_size"] < whole <= NUM_DOCUMENT_TOKENS
        assert found == sorted(found, reverse=True)
        # The last block of an uncompressed document is not full, so it is neither cached nor looked up.
        # With windows or a budget the last one may need less than is planned.
        num_more = found.count(whole) - row["documents"]
        assert num_more >= 0, (row, found)
        assert num_more <= 1 or not is_compressed, (row, found)


def test_the_longest_request_of_a_default_budget(capsys, tiny_model):
    """The context that vLLM finds for `--max-model-len auto`, many times the cache, with a prompt that fills it."""
    budget = {"default_max_tokens": 300, **INTERVALS}
    full_layers, model = (0,), str(tiny_model("llama", max_position_embeddings=10**6))
    memory = {"kv_cache_memory_bytes": 2 << 20, "num_gpu_blocks_override": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # see `case`
        ours = bare_rule(full_layers=full_layers, **budget)
        with running(model, full_layers, max_model_len=-1, **memory, **ours) as engine:
            longest = engine.llm.llm_engine.vllm_config.model_config.max_model_len
            capsys.readouterr()  # the engine's log
            words = [f"--kv-cache-gib={(2 << 20) / 2**30}", "--context=1", "--output=1", "--budgets=300"]
            words += [f"--{name.replace('_', '-')}={rows}" for name, rows in INTERVALS.items()]
            cli.plan([model, *words, "--full-layers=0", "--device=cpu", "--dtype=float32", "--protect=0:0", "--json"])
            *_, whole, planned = json.loads(capsys.readouterr().out)["engines"][1]["rows"]
            assert longest == planned["longest_request"] > 2 * whole["longest_request"]
            prompts = [[(i * 31) % 40_000 + 1000 for i in range(longest - 2)]]
            (output,) = engine.generate(prompts, [greedy(2)])
            assert len(output.outputs[0].token_ids) == 2
