"""Asks the retrieval prompts of the grid over HTTP, as clients do, and writes their pooled loss.

python -m benchmarks.quality.over_http PROMPTS URL FILE

PROMPTS is the file that grid.py made for the model at URL, FILE a JSON file. The server decides how a request is
compressed; the whole cache is asked for with `kv_keep_ratio: 1`.
"""

import argparse
import json
import pickle
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import httpx

from benchmarks.quality.pooled import difference, pooled
from benchmarks.quality.settings import MAIN_LENGTH, RETRIEVAL, WHOLE
from vllm_l2kv.tools.evaluation.cases import Answer, Case
from vllm_l2kv.tools.evaluation.variants import HIDDEN, SEEN

NUM_AT_ONCE = 8
TIMEOUT_S = 600


class Asked(NamedTuple):
    """A prompt's score, and the share of the whole cache that its request held at its end."""

    score: float
    memory: float


def main() -> None:
    """Asks every prompt three times, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    prompts = pickle.loads(args.prompts.read_bytes())
    cases = {task: prompts[MAIN_LENGTH, task] for task in RETRIEVAL}
    with httpx.Client(base_url=args.url, timeout=TIMEOUT_S) as client:
        name = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        compression = client.get("/v1/kv_compression").raise_for_status().json()
        version = client.get("/version").raise_for_status().json()["version"]
        found = {
            how: {task: list(ask(client, name, of_task, how)) for task, of_task in cases.items()}
            for how in (WHOLE, SEEN, HIDDEN)
        }
    defaults = {field["name"]: field["default"] for field in compression["fields"]}
    about = {"model": Path(name).name, "vllm": version, "full_layers": compression["full_layers"]}
    row = {**about, "full_heads": compression["full_heads"], "defaults": defaults, **results(found)}
    args.file.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def ask(client: httpx.Client, model: str, cases: list[Case], how: str) -> Iterator[Asked]:
    """Yields the result of each prompt, asked in one of the three ways."""

    def one(case: Case) -> Asked:
        body = {"model": model, "prompt": list(case.prompt), "max_tokens": case.num_tokens, "temperature": 0}
        ways: Mapping[str, dict[str, Any]] = {
            WHOLE: {"kv_keep_ratio": 1},
            SEEN: {},
            HIDDEN: {"kv_prefix_tokens": case.num_document_tokens},
        }
        answer = client.post("/v1/completions", json=body | ways[how]).raise_for_status().json()
        score = case.score(Answer(answer["choices"][0]["text"], (), ()))["score"]
        return Asked(score, answer["usage"]["kv_cache"]["memory_ratio"])

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        yield from pool.map(one, cases)


def results(found: Mapping[str, Mapping[str, list[Asked]]]) -> dict[str, Any]:
    """Pooled scores, with 95 % intervals of losses, and mean memory."""
    scores = {
        how: {task: [each.score for each in of_task] for task, of_task in by.items()} for how, by in found.items()
    }
    return {
        "num_prompts": sum(map(len, scores[WHOLE].values())),
        "scores": {how: {task: round(mean(values), 4) for task, values in by.items()} for how, by in scores.items()},
        WHOLE: [round(value, 4) for value in pooled(scores[WHOLE])],
        **{
            how: {
                "difference": [round(value, 4) for value in difference(scores[how], scores[WHOLE])],
                "memory": round(mean(each.memory for of_task in found[how].values() for each in of_task), 4),
            }
            for how in (SEEN, HIDDEN)
        },
    }


if __name__ == "__main__":
    main()
