"""Several questions about one document, which is compressed once, with OpenAI's Python client.

Needs a running server (`make serve`):

.venv/bin/python examples/document_questions.py [TEXT_FILE]
"""

import os
import sys
import time
from pathlib import Path

from openai import OpenAI

QUESTIONS = (
    "Who built the lighthouse?",
    "In which year was the lighthouse built?",
    "What is the lighthouse called?",
)
# The same for all questions: a request finds rows by the document's tokens and these fields.
FIELDS = {"kv_keep_ratio": 0.5, "kv_scorer": "keydiff_value", "kv_prefix_messages": 1}


def ask(client: OpenAI, model: str, document: str, question: str, max_tokens: int) -> None:
    """Streams one answer, then prints the time to first token and how much of the prompt was found.

    `cached_tokens` are prompt tokens found in any cache, `found_tokens` those of them that were found compressed.
    """
    sent, first, words, usage = time.monotonic(), None, [], None
    stream = client.chat.completions.create(
        model=model,
        # The document is the first message, so it ends where `kv_prefix_messages` says.
        messages=[{"role": "system", "content": document}, {"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=FIELDS,
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices:
            first = first or time.monotonic() - sent
            words.append(chunk.choices[0].delta.content or "")
    # vLLM reports cached tokens if the server was started with --enable-prompt-tokens-details.
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else "unknown"
    print(f"--- {question}\n{''.join(words)}")
    print(f"first token after {first:.2f} s, cached_tokens {cached}, {usage.model_extra['kv_cache']}")


def main() -> None:
    """Puts the document into the cache, then asks."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("lighthouse.txt")
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    model = client.models.list().data[0].id
    # An ordinary request of one token: afterwards the compressed document is in the cache.
    ask(client, model, file.read_text(), "Read this.", max_tokens=1)
    for question in QUESTIONS:
        ask(client, model, file.read_text(), question, max_tokens=40)


if __name__ == "__main__":
    main()
