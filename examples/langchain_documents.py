"""LangChain: a chain that asks several questions about one document, which is compressed once.

Needs a running server (`make serve`) and a separate environment:

pip install langchain-openai
python examples/langchain_documents.py [TEXT_FILE]
"""

import os
import sys
from pathlib import Path

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

QUESTIONS = (
    "Who built the lighthouse?",
    "In which year was the lighthouse built?",
    "What is the lighthouse called?",
)


def main() -> None:
    """Prints each answer and the tokens of the document that it found."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("lighthouse.txt")
    model = ChatOpenAI(
        model=os.environ.get("MODEL", "SmolLM2-135M-Instruct"),
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        temperature=0,
        max_tokens=40,
        extra_body={"kv_keep_ratio": 0.5, "kv_scorer": "keydiff_value", "kv_prefix_messages": 1},
    )
    # The document is the first message, and that message holds nothing else.
    prompt = ChatPromptTemplate([("system", "{document}"), ("user", "{question}")])
    chain = prompt.partial(document=file.read_text()) | model
    # All at once: one request computes the document, the others wait for it.
    answers = chain.batch([{"question": question} for question in QUESTIONS])
    for question, message in zip(QUESTIONS, answers, strict=True):
        print(f"--- {question}\n{message.content}")
        print(message.response_metadata["token_usage"]["kv_cache"])


if __name__ == "__main__":
    main()
