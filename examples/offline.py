"""Without a server: two requests in one batch, of which only the first is compressed.

.venv/bin/python examples/offline.py [MODEL]
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

import vllm_l2kv


def main() -> None:
    """Generates twice from one prompt and prints both texts."""
    if len(sys.argv) > 1:
        model = sys.argv[1]
    else:
        from vllm_l2kv.tools.demo_model import ensure_demo_model

        model = str(ensure_demo_model())
    text = Path(__file__).with_name("lighthouse.txt").read_text()
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=2 * 2**30,
        **vllm_l2kv.engine_args(full_layers=(0, 1)),
    )
    asked = {"kept half": vllm_l2kv.compression(keep_ratio=0.5), "kept everything": None}
    params = [SamplingParams(max_tokens=60, temperature=0, extra_args=extra_args) for extra_args in asked.values()]
    messages = [{"role": "user", "content": f"{text}\n\nSummarize this text in two sentences."}]
    for name, output in zip(asked, llm.chat([messages] * len(asked), params), strict=True):
        print(f"--- {name}: {(output.kv_transfer_params or {}).get('kv_cache')}\n{output.outputs[0].text}")


if __name__ == "__main__":
    main()
