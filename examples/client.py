"""One question about one text at several keep ratios, with OpenAI's Python client.

Needs a running server (`make serve`):

.venv/bin/python examples/client.py [TEXT_FILE] [QUESTION]
"""

import os
import sys
from pathlib import Path

from openai import OpenAI

RATIOS = (1.0, 0.7, 0.5)


def main() -> None:
    """Prints each answer with the KV usage that the server reports."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("lighthouse.txt")
    question = sys.argv[2] if len(sys.argv) > 2 else "Summarize this text in two sentences."
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    model = client.models.list().data[0].id
    for ratio in RATIOS:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"{file.read_text()}\n\n{question}"}],
            max_tokens=60,
            temperature=0,
            # The question is at the end, among the 64 tokens that the server protects.
            extra_body={"kv_keep_ratio": ratio},
        )
        print(f"--- kv_keep_ratio {ratio}: {answer.usage.model_extra['kv_cache']}")
        print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
