"""An agent that calls a tool 30 times under a budget: its conversation grows, but its KV cache does not.

Needs a server that can parse its model's tool calls, and that compacts prompts often enough for this short text:

make serve ARGS="--enable-auto-tool-choice --tool-call-parser hermes --kv-prompt-interval 256"
.venv/bin/python examples/agent_loop.py [TEXT_FILE] [CALLS]

The demo model is too small to call tools by itself, so each request names the tool to call.
"""

import os
import sys
from itertools import pairwise
from pathlib import Path

from openai import OpenAI

BUDGET = 512
TOOL = {
    "type": "function",
    "function": {
        "name": "read_page",
        "description": "Reads the next page of the book.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"page": {"type": "string", "enum": ["next"]}},
            "required": ["page"],
            "additionalProperties": False,
        },
    },
}


def pages_of(text: str, num_pages: int) -> list[str]:
    """Returns the text in pages of equal numbers of words."""
    words = text.split()
    bounds = [len(words) * number // num_pages for number in range(num_pages + 1)]
    return [" ".join(words[start:end]) for start, end in pairwise(bounds)]


def main() -> None:
    """Prints for each turn how much of the conversation it found compressed, and how much it holds at its end."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("lighthouse.txt")
    num_calls = int(sys.argv[2]) if len(sys.argv) > 2 else 30
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "Read the book page by page."}]
    for turn, page in enumerate(pages_of(file.read_text(), num_calls), start=1):
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=100,
            temperature=0,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "read_page"}},
            # Without a document, a turn continues from the last compaction inside an earlier prompt.
            extra_body={"kv_max_tokens": BUDGET},
        )
        (call,) = answer.choices[0].message.tool_calls
        # Messages are only appended, so that each prompt begins with the one before it.
        messages.append({"role": "assistant", "content": "", "tool_calls": [call.model_dump()]})
        messages.append({"role": "tool", "tool_call_id": call.id, "content": page})
        # vLLM reports cached tokens if the server was started with --enable-prompt-tokens-details.
        details = answer.usage.prompt_tokens_details
        numbers = {"found_tokens": 0, **answer.usage.model_extra["kv_cache"]}
        numbers.pop("reason", None)  # present in the first turns, which are shorter than the budget
        print(f"turn {turn}: cached_tokens {details.cached_tokens if details else 'unknown'}, {numbers}")


if __name__ == "__main__":
    main()
