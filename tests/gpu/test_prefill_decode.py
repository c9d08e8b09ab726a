"""A prefill/decode pair on GPUs: an engine in another process computes prompts, this one loads and compacts them.

The other process uses the last GPU, this one the first, which may be the same. Needs the package nixl. Run it alone: a
process has one KV connector.

UCX copies between the processes by CUDA IPC, which some virtual machines lack; then loads fail and loaded tokens are
missing. `UCX_LOG_LEVEL=info` names the transports; `UCX_TLS=cuda_copy,cuda_ipc,sm,self,tcp` leaves out network cards.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from agreement import agreement, cases_of, check_rules, rms, steps_of
from engine import bare_rule, keep
from http_server import free_port
from prefilling import REMOTE, Prefilling
from usages import numbers_of
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

pytest.importorskip("nixl")
pytestmark = pytest.mark.gpu

INTERVALS, LENGTHS, NUM_TOKENS = (300, 5), (33, 449, 1000, 2500), 16
BUDGET = {"ratio": "1", "budget": 200, "first": 4, "last": 64}
RULES = [{"ratio": "1.0"}, {"ratio": "0.5"}, {"ratio": "0.25"}, {"ratio": "0.5", "first": 4, "last": 32}, BUDGET]
SIZES = {
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 32,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 1 << 30,
    "compilation_config": {"cudagraph_capture_sizes": [1, 8, 32]},
    "logprobs_mode": "raw_logits",
    "max_logprobs": 20,
    "seed": 0,
}


class Pair:
    """Both engines, with the `generate` of one.

    Attributes:
        loaded: Tokens that each of the last requests loaded.
    """

    def __init__(self, prefilling, decoding) -> None:
        self.prefilling, self.decoding, self.loaded = prefilling, decoding, []
        connector = decoding.scheduler.connector
        update = connector.update_state_after_alloc

        def noted(request, blocks, num_external_tokens):
            if num_external_tokens:
                self.loaded.append(num_external_tokens)
            return update(request, blocks, num_external_tokens)

        connector.update_state_after_alloc = noted

    def generate(self, prompts, params):
        self.loaded.clear()
        first = [with_transfer(each, REMOTE, max_tokens=1) for each in params]
        self.sent = self.prefilling.answer(prompts, first)
        second = [with_transfer(each, sent.transfer) for each, sent in zip(params, self.sent, strict=True)]
        return self.decoding.generate(prompts, second)


def with_transfer(params, transfer, **changes):
    changed = copy.deepcopy(params)
    changed.extra_args = {**(params.extra_args or {}), "kv_transfer_params": dict(transfer)}
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


@pytest.fixture(scope="module", params=[(0, 1), (3, 29)], ids=str)
def full_layers(request):
    """The second ones come after compressed layers at the same place of a block, where vLLM alone would lose rows."""
    return request.param


@pytest.fixture(scope="module")
def pair(full_layers, demo_model, start_small):
    rule = bare_rule(full_layers=full_layers, prompt_interval=INTERVALS[0], answer_interval=INTERVALS[1])
    arguments = {**SIZES, **rule}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
        connected = {**arguments, "kv_transfer_config": pair_config()}
        prefilling = Prefilling(torch.cuda.device_count() - 1, free_port(), demo_model, connected)
        try:
            ensure_kv_transfer_shutdown()
            decoding = start_small(demo_model, **{**connected, "kv_transfer_config": pair_config()})
            yield Pair(prefilling, decoding)
            decoding.shutdown()
        finally:
            prefilling.stop()


def pair_config():
    """Settings for one engine, which has an id of its own."""
    return KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both", kv_buffer_device="cuda")


def is_loaded(prompt, rule) -> bool:
    """Whether nothing is compacted inside the prompt."""
    return "budget" not in rule or len(prompt) < rule["budget"] + INTERVALS[0]


def test_loaded_prompts_are_compacted_as_the_reference_does(pair, full_layers, exact, rounded, text_ids):
    cases = cases_of(text_ids, LENGTHS, RULES)
    asked = {"full_layers": full_layers, "intervals": INTERVALS, "num_tokens": NUM_TOKENS}
    print(check_rules(pair, (exact, rounded), cases, **asked))
    assert sorted(pair.loaded) == sorted(len(prompt) for prompt, rule in cases if is_loaded(prompt, rule))
    for sent, (_, rule) in zip(pair.sent, cases, strict=True):
        assert sent.usage["evicted_tokens"] == 0
        assert sent.usage.get("reason", "Another").startswith("Another") or rule == RULES[0]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_pair_answers_as_the_prefilling_engine_alone(pair, text_ids, rule):
    prompts = [text_ids[3000 + 50 * i :][:length] for i, length in enumerate((100, 700))]
    params = [keep(**rule, num_tokens=NUM_TOKENS, logprobs=20) for _ in prompts]
    together = pair.generate(prompts, params)
    assert len(pair.loaded) == sum(is_loaded(prompt, rule) for prompt in prompts)
    alone = pair.prefilling.answer(prompts, params)
    for output, answer in zip(together, alone, strict=True):
        # An engine alone may find the prompt that it computed before, whole.
        assert numbers_of(output) == numbers_of(SimpleNamespace(kv_transfer_params={"kv_cache": answer.usage}))
        found = agreement(steps_of(output), answer.steps)
        print(f"{rule}: {found.num_equal} equal tokens, logits differ by {rms(found.differences or [0.0]):.4f}")
        assert found.num_equal == NUM_TOKENS or found.steps <= 4
