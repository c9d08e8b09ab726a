"""The share of the KV cache that one request holds during its answer, at several keep ratios, from `/metrics`.

Needs a running server (`make serve`):

.venv/bin/python examples/kv_usage.py [TEXT_FILE] [QUESTION]
"""

import os
import sys
import urllib.request
from pathlib import Path

from openai import OpenAI

RATIOS = (1.0, 0.7, 0.5)
BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1")
GAUGE = "vllm:kv_cache_usage_perc{"


def kv_cache_in_use() -> float:
    """Returns the share of the server's KV-cache blocks that requests hold."""
    metrics = urllib.request.urlopen(BASE_URL.removesuffix("/v1") + "/metrics").read().decode()
    (line,) = [line for line in metrics.splitlines() if line.startswith(GAUGE)]
    return float(line.split()[-1])


def main() -> None:
    """Streams one answer for each ratio; a request alone on the server holds all blocks in use."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("lighthouse.txt")
    question = sys.argv[2] if len(sys.argv) > 2 else "Who was the first keeper of the lighthouse?"
    client = OpenAI(base_url=BASE_URL, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    model = client.models.list().data[0].id
    for ratio in RATIOS:
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"{file.read_text()}\n\n{question}"}],
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            # The question is at the end, among the 64 tokens that the server protects.
            extra_body={"kv_keep_ratio": ratio},
        )
        words, in_use, usage = [], 0.0, None
        for chunk in stream:
            usage = chunk.usage or usage
            if chunk.choices:
                words.append(chunk.choices[0].delta.content or "")
                if len(words) == 8:  # the first token comes from the whole cache
                    in_use = kv_cache_in_use()
        numbers = usage.model_extra["kv_cache"]
        reason = numbers.pop("reason", None)  # why nothing was evicted although the ratio is below 1
        print(f"--- kv_keep_ratio {ratio}: {in_use:.2%} of the KV cache in use, {numbers}")
        if reason:
            print(f"Kept whole: {reason}")
        print("".join(words))


if __name__ == "__main__":
    main()
