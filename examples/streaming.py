"""A streamed answer: text as it comes, and the numbers of the KV cache in the last chunk.

Needs a running server (`make serve`):

.venv/bin/python examples/streaming.py [TEXT_FILE]
"""

import os
import sys
from pathlib import Path

from openai import OpenAI


def main() -> None:
    """Prints the answer while it is generated, then `usage.kv_cache`."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("lighthouse.txt")
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": f"{file.read_text()}\n\nSummarize this text in two sentences."}],
        max_tokens=60,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},  # without it no chunk carries usage
        extra_body={"kv_keep_ratio": 0.5},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            print(f"\n--- {chunk.usage.model_extra['kv_cache']}")


if __name__ == "__main__":
    main()
