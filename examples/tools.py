"""A tool call, with half of the prompt kept.

Needs a server that can parse its model's tool calls:

make serve ARGS="--enable-auto-tool-choice --tool-call-parser hermes"
.venv/bin/python examples/tools.py [TEXT_FILE]

The demo model is too small to call tools by itself, so the request names the tool to call.
"""

import os
import sys
from pathlib import Path

from openai import OpenAI

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up_keeper",
        "description": "Looks a keeper up in the register.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "keeper": {"type": "string", "enum": ["Hannah Trewin", "Samuel Roche", "Edith Marrack", "Owen Pascoe"]}
            },
            "required": ["keeper"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    """Prints the call that the model makes, and `usage.kv_cache`."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("lighthouse.txt")
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": f"{file.read_text()}\n\nLook up the first keeper."}],
        max_tokens=100,
        temperature=0,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "look_up_keeper"}},
        extra_body={"kv_keep_ratio": 0.5},
    )
    (call,) = answer.choices[0].message.tool_calls
    print(call.function.name, call.function.arguments)
    print(answer.usage.model_extra["kv_cache"])


if __name__ == "__main__":
    main()
