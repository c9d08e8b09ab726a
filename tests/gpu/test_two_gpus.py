"""Tensor, pipeline and expert parallelism on two GPUs as users run them, compared with one GPU and with stock vLLM.

Sums split between GPUs are rounded differently, so answers are compared as in `test_engine.py`. Two ranks cannot share
the demo model's three KV heads and nine query heads, so it gets a fourth KV head that does not change its answers. A
model with random weights has one KV head for both ranks.

`--rows FOLDER` adds the findings to FOLDER/tp2_checks.jsonl, from which benchmarks/speed/tables.py makes a page.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from agreement import Step, agreement, likely_differences, rms, steps_of, tokens_of
from engine import Engine, bare_rule, keep
from ranks import MixedLoad, start_profile, stop_profile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

RATIOS = ("1.0", "0.5", "0.25")
LOAD = [*({"ratio": ratio} for ratio in RATIOS), {"ratio": "1", "budget": 60}, {"ratio": "0.5", "budget": 100}]
LOAD += [{"ratio": "0.4", "document": 100}]
LENGTHS = (33, 449, 1000, 2500)
NUM_TOKENS = 16
WIDENED, REPLICATED = "demo model, a fourth KV head", "one KV head on both ranks"
PIPELINE = "demo model, half of its layers on each rank"


class Shape(NamedTuple):
    """A model with its references in fp32 and bf16, and its answers by number of GPUs and ratio."""

    name: str
    exact: Any
    rounded: Any
    two_gpus: Engine
    answers: dict[int, dict[str, list[list[Step]]]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(WIDENED, id="widened"),
        pytest.param(REPLICATED, id="replicated"),
        # Layers 0 and 1 are full, so the second rank has no full heads, and one of its groups has no layers.
        pytest.param(PIPELINE, id="pipeline"),
    ],
)
def shape(request, widened_model, replicated_model, demo_model, text_ids, start_small) -> Iterator[Shape]:
    from reference import Reference

    # The demo model itself: the fourth head must not change anything.
    model, right = {
        WIDENED: (widened_model, demo_model),
        REPLICATED: (replicated_model, replicated_model),
        PIPELINE: (demo_model, demo_model),
    }[request.param]
    degree = "pipeline_parallel_size" if request.param == PIPELINE else "tensor_parallel_size"
    answers = {}
    for num_gpus in (1, 2):
        rule = bare_rule(full_layers=(0, 1), prompt_interval=100, answer_interval=3)
        engine = start_small(model, **{degree: num_gpus}, **rule)
        answers[num_gpus] = {ratio: answers_of(engine, text_ids, ratio) for ratio in RATIOS}
    references = [Reference(right, dtype, engine_device()) for dtype in (torch.float32, torch.bfloat16)]
    yield Shape(request.param, *references, engine, answers)
    engine.shutdown()


def engine_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def prompts_of(text_ids: list[int]) -> list[list[int]]:
    return [text_ids[7 * i : 7 * i + length] for i, length in enumerate(LENGTHS)]


def answers_of(engine: Engine, text_ids: list[int], ratio: str) -> list[list[Step]]:
    prompts = prompts_of(text_ids)
    params = [keep(ratio, num_tokens=NUM_TOKENS, logprobs=20)] * len(prompts)
    return [steps_of(output) for output in engine.generate(prompts, params)]


@pytest.mark.parametrize("ratio", RATIOS)
def test_two_gpus_answer_like_one_within_reach_of_bf16(shape, text_ids, ratio, note):
    of_one, of_fp32, bf16_of_fp32, of_wrong = [], [], [], []
    found = []
    for prompt, one, two in zip(prompts_of(text_ids), *(shape.answers[n][ratio] for n in (1, 2)), strict=True):
        found.append(agreement(one, two))
        of_one += found[-1].differences
        right, bf16 = (model.logits(prompt, tokens_of(two), ratio) for model in (shape.exact, shape.rounded))
        wrong = shape.exact.logits(prompt, tokens_of(two), "0.1" if ratio == "1.0" else "1.0")
        of_fp32 += likely_differences(two, right)
        likely = right.topk(20).indices
        bf16_of_fp32 += (right - bf16).gather(1, likely).flatten().tolist()
        of_wrong += (right - wrong).gather(1, likely).flatten().tolist()
    reach = max(map(abs, bf16_of_fp32))
    note(
        model=shape.name,
        keep_ratio=float(ratio),
        num_answers=len(found),
        num_equal=sum(one.num_equal == NUM_TOKENS for one in found),
        of_one_gpu=rms(of_one),
        of_fp32=rms(of_fp32),
        bf16_of_fp32=rms(bf16_of_fp32),
        wrong_ratio_of_fp32=rms(of_wrong),
        gaps=[one.gap for one in found],
        reach=reach,
    )
    for length, one in zip(LENGTHS, found, strict=True):
        part_well = one.steps <= 2 or one.gap <= reach
        assert part_well, f"{length} tokens part after {one.num_equal} at {one.gap}, {one.steps} steps of bf16"
    assert rms(of_one) <= 2 * rms(bf16_of_fp32)
    assert rms(of_fp32) <= 2 * rms(bf16_of_fp32)
    assert rms(of_wrong) > 2 * rms(bf16_of_fp32), "another ratio must be out of reach"


def test_200_mixed_requests_with_aborts_on_ranks_with_equal_state(shape, text_ids, note):
    load = MixedLoad(text_ids, LOAD)
    load.run(shape.two_gpus)
    looks = load.looks
    num_found = looks["found documents"] + looks["found conversations"]
    note(
        check=f"{load.num_requests} concurrent requests of mixed ratios, budgets, documents and lengths ({shape.name})",
        found=f"{looks['aborted']} aborted; evicted counts and block tables of both ranks compared {looks['times']} "
        f"times, with up to {looks['requests']} requests on them, {looks['compacted']} of them compacted, and always "
        f"equal, as to the scheduler's; {num_found} began on rows that another one had compacted; every block was "
        "in one place after each step, and all were free in the end",
    )
    assert looks["requests"] > 100, looks
    assert looks["compacted"] > 50, looks
    assert looks["aborted"] > 10, looks
    assert looks["found documents"], looks
    assert looks["found conversations"], looks
    assert len(load.answers.keys() - set(load.aborted)) == load.num_requests - load.num_aborted


def test_compaction_adds_no_communication(widened_model, text_ids, start_small, note):
    prompts = [text_ids[1500 + 11 * i : 1800 + 11 * i] for i in range(3)]
    profiles = {}
    for name, ours in (("stock", {}), ("l2kv", bare_rule(full_layers=(0, 1)))):
        engine = start_small(widened_model, tensor_parallel_size=2, **ours)
        params = [keep("0.5") if ours else keep("1.0")] * len(prompts)
        engine.generate([prompt[50:] for prompt in prompts], params)  # warm-up
        engine.llm.collective_rpc(start_profile)
        outputs = engine.generate(prompts, params)
        profiles[name] = engine.llm.collective_rpc(stop_profile)
        if ours:
            assert all(output.kv_transfer_params["kv_cache"]["evicted_tokens"] == 150 for output in outputs)
        engine.shutdown()
    stock, ours = profiles["stock"], profiles["l2kv"]
    counts = {name.split("(")[0].split("<")[0].removeprefix("void "): count for name, count in ours[0].items()}
    note(
        check="communication on each rank while three prompts are compacted, by PyTorch's profiler",
        found=f"{'exactly' if ours == stock else 'NOT'} that of stock vLLM: {counts}",
        profiles=profiles,
    )
    assert min(sum(rank.values()) for rank in stock) > 12, stock  # at least one for each token
    assert ours == stock


@pytest.mark.parametrize(
    ("heads", "arguments", "sentence"),
    [
        pytest.param((6, 3), {"tensor_parallel_size": 2}, "does not support 3 KV heads on 2 ranks", id="uneven"),
        pytest.param((9, 3), {"tensor_parallel_size": 2}, "must be divisible by tensor parallel size", id="vllm"),
    ],
)
def test_refused(tiny_model, start_small, capfd, heads, arguments, sentence, note):
    num_heads, num_kv_heads = heads
    shape = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "hidden_size": 64 * num_heads}
    model = tiny_model("llama", head_dim=64, **shape)
    begin = time.monotonic()
    with pytest.raises(Exception, match=r"parallel|initialization failed") as caught:
        start_small(model, **bare_rule(full_layers=(0,)), **arguments)
    seconds = time.monotonic() - begin
    captured = capfd.readouterr()
    said = f"{caught.value}\n{captured.out}\n{captured.err}"
    note(
        check=f"{num_heads} heads, {num_kv_heads} KV heads, {' '.join(map(str, *arguments.items()))}",
        found=f'{"refused" if sentence in said else "NOT refused"} after {seconds:.0f} seconds: "{sentence}"',
    )
    assert sentence in said
    assert seconds < 120


def test_two_engines_with_expert_parallelism(tiny_model, text_ids, tmp_path, note):
    """With experts on both GPUs engines wait for each other, also when only one has requests."""
    from concurrent.futures import ThreadPoolExecutor

    import httpx
    from http_server import Server, expected_usage
    from usages import TINY_SHARE

    words = "--served-model-name tiny --max-model-len 2048 --kv-full-layers 0 --data-parallel-size 2"
    words += " --enable-expert-parallel --gpu-memory-utilization 0.1 --kv-cache-memory-bytes 2147483648 --enforce-eager"
    model = tiny_model("qwen3_moe", head_dim=64, hidden_size=256, moe_intermediate_size=256)
    ratios = [(1.0, 0.5, 0.25)[number % 3] for number in range(24)]

    def ask(number: int) -> Any:
        prompt = text_ids[5 * number : 5 * number + 200 + number]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 8 + number, "temperature": 0, "ignore_eos": True}
        body["kv_keep_ratio"] = ratios[number]
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)

    with Server(tmp_path / "server.log", str(model), *words.split()) as server:
        alone = ask(0)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(len(ratios))))
        assert server.is_healthy()
    right = [
        answer.status_code == 200
        and answer.json()["usage"]["kv_cache"]
        == expected_usage(200 + number, 8 + number, full_share=TINY_SHARE, keep_ratio=ratios[number])
        for number, answer in enumerate(answers)
    ]
    note(
        check="data parallelism of 2 with expert parallelism, four experts with made-up weights",
        found=f"{sum(right)} of {len(right)} requests answered and compacted as asked",
    )
    assert alone.status_code == 200, alone.text
    assert all(right), [answer.text for answer in answers]
