"""Sessions of vLLM's own async engine, as an offline user holds them."""

import asyncio

import pytest
from engine import bare_rule
from reference import expected_numbers
from usages import numbers_of
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_l2kv import compression

CHUNKS = ([5] * 40, [6] * 30, [7] * 20)
MAX_TOKENS = 4


def params(extra_args=None) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra_args,
    )


async def chunks(waits: float):
    for chunk in CHUNKS:
        yield StreamingInput(prompt=TokensPrompt(prompt_token_ids=list(chunk)))
        await asyncio.sleep(waits)


async def outputs_of(engine, prompt, extra_args, req_id) -> list:
    return [output async for output in engine.generate(prompt, params(extra_args), req_id)]


def tokens(outputs) -> list[int]:
    return [token for output in outputs for token in output.outputs[0].token_ids]


@pytest.mark.timeout(900)
def test_sessions_beside_compressed_requests(llama):
    async def run():
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(llama), dtype="float32", enforce_eager=True, max_model_len=512, **bare_rule(full_layers=(0,))
            )
        )
        half = compression(0.5)
        try:
            for waits in (0, 1):
                whole = await outputs_of(engine, chunks(waits), compression(1), f"whole{waits}")
                assert numbers_of(whole[-1]) == expected_numbers(40 + 3 + 30 + 3 + 20, MAX_TOKENS)
                first = TokensPrompt(prompt_token_ids=list(CHUNKS[0]))
                alone, refused, compressed = await asyncio.gather(
                    outputs_of(engine, first, None, f"alone{waits}"),
                    outputs_of(engine, chunks(waits), half, f"refused{waits}"),
                    outputs_of(engine, first, half, f"compressed{waits}"),
                )
                assert len(tokens(whole)) == len(CHUNKS) * MAX_TOKENS
                assert tokens(whole)[:MAX_TOKENS] == tokens(alone)
                reasons = [output.outputs[0].stop_reason for output in refused if output.outputs[0].finish_reason]
                assert reasons  # one for each chunk, but vLLM joins outputs that its caller has not taken yet
                assert all("streaming input" in reason for reason in reasons)
                assert numbers_of(compressed[-1]) == expected_numbers(40, MAX_TOKENS, "0.5")
        finally:
            engine.shutdown()

    asyncio.run(run())
