"""Runs the rounds of a load test one after another, so that only one server is under load at a time."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from vllm_l2kv.tools.bench.client import Answer, ask, body_of
from vllm_l2kv.tools.bench.drive import Ask, Outcome, drive
from vllm_l2kv.tools.bench.load import Load, Planned, planned
from vllm_l2kv.tools.bench.memory import counter
from vllm_l2kv.tools.bench.prompts import Prompts
from vllm_l2kv.tools.bench.servers import OURS, Server
from vllm_l2kv.tools.bench.summary import Row, label, request_row, summarise
from vllm_l2kv.tools.bench.watch import watching


@dataclass(frozen=True)
class Plan:
    """What a load test measures.

    Args:
        servers: The vllm-l2kv server, and a stock vLLM server to compare with, if there is one.
        asked: For each round, the fields of requests to vllm-l2kv.
        load: The load, the same in every round.
        num_warmups: Requests before each round that are not measured.
        fields: Additional fields of requests to vllm-l2kv.
        timeout_s: Seconds after which a request counts as failed.
        sample_s: Seconds between samples of the server.
    """

    servers: Sequence[Server]
    asked: Sequence[Mapping[str, float]]
    load: Load
    num_warmups: int = 1
    fields: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0
    sample_s: float = 1.0


@dataclass
class Round:
    """The results of one load on one server."""

    row: Row
    requests: list[Row]
    samples: list[Row]


def rounds(plan: Plan, prompts: Prompts) -> Iterator[Round]:
    """Measures each round on vllm-l2kv, and the same load on stock vLLM right before or after it, if there is one.

    The order alternates, so that a machine that gets slower or faster favors neither.
    """
    for i, asked in enumerate(plan.asked):
        for server in plan.servers if i % 2 == 0 else reversed(plan.servers):
            yield asyncio.run(_round(plan, prompts, server, i, asked))


async def _round(plan: Plan, prompts: Prompts, server: Server, i: int, asked: Mapping[str, float]) -> Round:
    kept = {"keep_ratio": asked["kv_keep_ratio"], "max_tokens": asked.get("kv_max_tokens")}
    about = {"engine": server.engine, "round": i, **kept, "model": server.model, "vllm": server.vllm}
    fields = {**plan.fields, **asked} if server.engine == OURS else {}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    outcomes: list[Outcome] = []
    async with server.client() as http:

        def sender(number: int) -> Ask:
            async def send(request: Planned) -> Answer:
                prompt = prompts.prompt(number, request.number, request.num_prompt_tokens)
                return await ask(http, body_of(server.model, prompt, request.num_output_tokens, fields), plan.timeout_s)

            return send

        # Warm-ups have other prompts, or the measured ones would be found in the prefix cache.
        warmup = replace(plan.load, rate=None, concurrency=1, num_requests=plan.num_warmups, duration_s=None)
        await drive(warmup, planned(warmup), sender(2 * i), lambda outcome: None)
        with tqdm(total=plan.load.num_requests, desc=label(about), unit="request") as bar:
            num_failed = 0

            def done(outcome: Outcome) -> None:
                nonlocal num_failed
                outcomes.append(outcome)
                num_failed += outcome.answer.error is not None
                bar.set_postfix(failed=num_failed, refresh=False)
                bar.update()

            async with watching(http, plan.sample_s, counter(server.pid)) as watch:
                await drive(plan.load, planned(plan.load), sender(2 * i + 1), done)
    row = {**about, "fields": fields, "started": started, "load": describe(plan), **summarise(outcomes, watch)}
    begin_s = min((outcome.answer.start_s for outcome in outcomes), default=0.0)
    requests = [about | request_row(outcome, begin_s) for outcome in outcomes]
    return Round(row, requests, [about | sample for sample in watch.rows()])


def describe(plan: Plan) -> Row:
    """The load, for the rows."""
    load = plan.load
    return {
        "arrivals": f"{load.concurrency} clients" if load.rate is None else f"{load.rate:g} requests/s",
        "until": f"{load.num_requests} requests" if load.num_requests is not None else f"{load.duration_s:g} s",
        "prompt_tokens": str(load.prompt_tokens),
        "output_tokens": str(load.output_tokens),
        "shared_prefix": load.shared_prefix,
        "warmups": plan.num_warmups,
        "seed": load.seed,
    }
