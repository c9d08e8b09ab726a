"""LangChain, with half of the prompt kept.

Needs a running server (`make serve`) and a separate environment:

pip install langchain-openai
python examples/langchain_chat.py [TEXT_FILE]
"""

import os
import sys
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI


def main() -> None:
    """Prints a chain's answer, then a message's numbers of the KV cache."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("lighthouse.txt")
    model = ChatOpenAI(
        model=os.environ.get("MODEL", "SmolLM2-135M-Instruct"),
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        temperature=0,
        max_tokens=60,
        extra_body={"kv_keep_ratio": 0.5},
    )
    prompt = ChatPromptTemplate([("user", "{text}\n\nWho was the first keeper of the lighthouse?")])
    print((prompt | model | StrOutputParser()).invoke({"text": file.read_text()}))

    # `usage_metadata` has only LangChain's own fields; the server's fields are in `response_metadata`.
    message = (prompt | model.bind(extra_body={"kv_keep_ratio": 0.25})).invoke({"text": file.read_text()})
    print(message.response_metadata["token_usage"]["kv_cache"])


if __name__ == "__main__":
    main()
