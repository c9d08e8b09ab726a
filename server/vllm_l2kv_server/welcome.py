"""First requests for copy and paste, printed when the server is ready."""

import asyncio
import json
import os
import sys
from argparse import Namespace

from starlette.datastructures import State

from vllm_l2kv_server.playground import has_playground

READY = "vllm-l2kv is ready"
"""The text begins with this."""
LAST_LINE = "Ctrl-C ends the server."
TEMPLATE = """
{ready} at {url}.{page}

This request keeps about half of its prompt's KV cache; `usage.kv_cache` of the answer has the numbers. It
sets `kv_protect_last`, since the default would protect the whole of such a short prompt:

curl {url}/v1/chat/completions -H 'Content-Type: application/json'{auth} -d '{body}'

Or in Python (pip install openai):

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
answer = client.chat.completions.create(
    model={model},
    messages=[{{"role": "user", "content": "What is a KV cache?"}}],
    max_tokens=64,
    temperature=0,
    extra_body={{"kv_keep_ratio": 0.5, "kv_protect_last": 16}},
)
print(answer.choices[0].message.content, answer.usage)

{last}
"""


def welcome_text(args: Namespace, model: str) -> str:
    """Returns requests to a server started with `args`, by curl and by the OpenAI client; they do not show its key."""
    scheme = "https" if args.ssl_certfile else "http"
    host = args.host if args.host not in (None, "", "0.0.0.0", "::") else "localhost"
    needs_key = bool(args.api_key or os.environ.get("VLLM_API_KEY"))
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is a KV cache?"}],
        "max_tokens": 64,
        "temperature": 0,
        "kv_keep_ratio": 0.5,
        "kv_protect_last": 16,
    }
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}"
    return TEMPLATE.format(
        ready=READY,
        last=LAST_LINE,
        url=url,
        auth=" -H 'Authorization: Bearer YOUR_API_KEY'" if needs_key else "",
        key="YOUR_API_KEY" if needs_key else "none",
        model=json.dumps(model),
        body=json.dumps(body),
        page=f" A page to try it: {url}/playground" if has_playground(args) else "",
    )


async def announce_when_ready(state: State, args: Namespace, model: str) -> None:
    """Prints the text once the server is ready, after vLLM's start-up log."""
    while not getattr(getattr(state, "server", None), "started", False):
        await asyncio.sleep(0.1)
    sys.stdout.write(f"\n{READY} at {args.uds}.\n\n{LAST_LINE}\n" if args.uds else welcome_text(args, model))
    sys.stdout.flush()
