"""Without a server: three questions about one document, which is compressed once, in one batch.

.venv/bin/python examples/offline_documents.py [MODEL]
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

import vllm_l2kv

QUESTIONS = (
    "Who built the lighthouse?",
    "In which year was the lighthouse built?",
    "What is the lighthouse called?",
)


def main() -> None:
    """Generates an answer to each question and prints how much of the document it found."""
    if len(sys.argv) > 1:
        model = sys.argv[1]
    else:
        from vllm_l2kv.tools.demo_model import ensure_demo_model

        model = str(ensure_demo_model())
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=2 * 2**30,
        **vllm_l2kv.engine_args(full_layers=(0, 1)),
    )
    document = {"role": "system", "content": Path(__file__).with_name("lighthouse.txt").read_text()}
    # The document's length in tokens, as the chat template writes it at the start of each prompt.
    num_tokens = len(llm.get_tokenizer().apply_chat_template([document], return_dict=False))
    extra_args = vllm_l2kv.compression(0.5, scorer="keydiff_value", prefix_tokens=num_tokens)
    params = SamplingParams(max_tokens=40, temperature=0, extra_args=extra_args)
    prompts = [[document, {"role": "user", "content": question}] for question in QUESTIONS]
    # One request computes the document, the others wait for it.
    for question, output in zip(QUESTIONS, llm.chat(prompts, params), strict=True):
        print(f"--- {question}\n{output.outputs[0].text}")
        print(f"cached_tokens {output.num_cached_tokens}, {output.kv_transfer_params['kv_cache']}")


if __name__ == "__main__":
    main()
