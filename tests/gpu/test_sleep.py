"""Sleep mode on a GPU: weights and KV cache leave the device and come back where CUDA graphs expect them."""

import pytest
import torch
from agreement import steps_of, tokens_of
from engine import keep

pytestmark = pytest.mark.gpu


def answer(engine, prompt, rule):
    (output,) = engine.generate([prompt], [keep(**rule, num_tokens=24, logprobs=20)])
    return output


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(
    "rule",
    [
        pytest.param({"ratio": "0.5"}, id="ratio"),
        pytest.param({"ratio": "1", "budget": 200}, id="budget"),
        pytest.param({"ratio": "0.25", "document": 900}, id="document"),
    ],
)
def test_answers_after_waking_up(sleepy, text_ids, level, rule):
    prompt = text_ids[100:1100]
    assert sleepy.kv_cache_manager.reset_prefix_cache()
    before = answer(sleepy, prompt, rule)
    # A compacted request, whose end the worker learns only after it wakes up.
    sleepy.add("compacted", text_ids[200:1200], keep(**rule, num_tokens=200))
    for _ in range(8):
        sleepy.step()
    assert any(getattr(manager, "num_evicted", None) for manager in sleepy.managers)
    sleepy.llm.llm_engine.abort_request(["compacted"])
    free, total = torch.cuda.mem_get_info()
    sleepy.llm.sleep(level)
    assert torch.cuda.mem_get_info()[0] - free > 0.1 * total
    sleepy.llm.wake_up()
    if level == 2:
        sleepy.llm.collective_rpc("reload_weights")
    sleepy.drain()
    sleepy.check_whole()
    after = answer(sleepy, prompt, rule)  # the request finds no rows of an earlier one
    assert after.num_cached_tokens == 0
    assert tokens_of(steps_of(after)) == tokens_of(steps_of(before))
