"""Two ranks in processes of their own, each with its heads: answers and blocks equal those of one rank."""

import pytest
from engine import keep
from reference import Reference
from vllm import envs

RATIOS = ("1.0", "0.5", "0.25")


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
