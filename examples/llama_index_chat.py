"""LlamaIndex, with half of the prompt kept.

Needs a running server (`make serve`) and a separate environment:

pip install llama-index-llms-openai-like
python examples/llama_index_chat.py [TEXT_FILE]
"""

import os
import sys
from pathlib import Path

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def main() -> None:
    """Prints the answer and its numbers of the KV cache."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("lighthouse.txt")
    model = OpenAILike(
        model=os.environ.get("MODEL", "SmolLM2-135M-Instruct"),
        api_base=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        is_chat_model=True,
        temperature=0,
        max_tokens=60,
        additional_kwargs={"extra_body": {"kv_keep_ratio": 0.5}},
    )
    question = f"{file.read_text()}\n\nWho was the first keeper of the lighthouse?"
    answer = model.chat([ChatMessage(role="user", content=question)])
    print(answer.message.content)
    print(answer.raw.usage.model_extra["kv_cache"])


if __name__ == "__main__":
    main()
