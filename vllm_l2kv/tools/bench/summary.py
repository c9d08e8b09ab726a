"""Turns a round into a JSON row."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from vllm_l2kv.messages.usage import memory_of_all
from vllm_l2kv.tools.bench.drive import Outcome
from vllm_l2kv.tools.bench.servers import OURS
from vllm_l2kv.tools.bench.watch import OWN_PREFIX, Watch

PERCENTILES = (50, 95, 99)
Row = dict[str, Any]


def summarise(outcomes: Sequence[Outcome], watch: Watch) -> Row:
    """Statistics of the answers and of the server's metrics; times in seconds, memory in bytes.

    Failed requests are only counted under their error. Values that could not be measured are `None`.
    """
    answered = [outcome for outcome in outcomes if outcome.answer.error is None]
    duration_s = duration(outcomes)
    num_output_tokens = sum(outcome.answer.usage["completion_tokens"] for outcome in answered)
    num_events = sum(len(outcome.answer.times_s) for outcome in answered)
    return {
        "num_requests": len(outcomes),
        "num_failed": len(outcomes) - len(answered),
        "errors": dict(Counter(outcome.answer.error for outcome in outcomes if outcome.answer.error is not None)),
        "duration_s": duration_s,
        "requests_per_s": len(answered) / duration_s if duration_s else None,
        "output_tokens_per_s": num_output_tokens / duration_s if duration_s else None,
        "prompt_tokens": sum(outcome.answer.usage["prompt_tokens"] for outcome in answered),
        "output_tokens": num_output_tokens,
        "tokens_per_event": num_output_tokens / num_events if num_events else None,
        "first_token_s": spread([first_token_s(outcome) for outcome in answered if outcome.answer.times_s]),
        "inter_token_s": spread([gap for outcome in answered for gap in gaps_s(outcome)]),
        "per_output_token_s": spread([per_output_token_s(outcome) for outcome in answered if gaps_s(outcome)]),
        "end_to_end_s": spread([end_to_end_s(outcome) for outcome in answered]),
        "max_late_s": max((outcome.late_s for outcome in outcomes), default=None),
        **_kv_cache(answered),
        **_watched(watch),
    }


def asked(row: Mapping[str, Any]) -> str:
    """The ratio or budget of a round, as text."""
    budget = row.get("max_tokens")  # older rows have only ratios
    return f"keep {row['keep_ratio']:g}" if budget is None else f"budget {budget:,}"


def label(row: Mapping[str, Any]) -> str:
    """Name of a row: engine, and ratio or budget of the round; stock vLLM keeps everything in each round."""
    return f"{row['engine']}{', ' if row['engine'] == OURS else ' beside '}{asked(row)}"


def duration(outcomes: Sequence[Outcome]) -> float:
    """Seconds from the first request's start to the last one's end."""
    if not outcomes:
        return 0.0
    return max(outcome.answer.end_s for outcome in outcomes) - min(outcome.answer.start_s for outcome in outcomes)


def first_token_s(outcome: Outcome) -> float:
    """Seconds from sending the request to its first token."""
    return outcome.answer.times_s[0] - outcome.answer.start_s


def gaps_s(outcome: Outcome) -> list[float]:
    """Seconds between consecutive events with new tokens."""
    return [later - earlier for earlier, later in pairwise(outcome.answer.times_s)]


def per_output_token_s(outcome: Outcome) -> float:
    """Mean seconds per token after the first."""
    num_tokens: int = outcome.answer.usage["completion_tokens"]
    return sum(gaps_s(outcome)) / max(num_tokens - 1, 1)


def end_to_end_s(outcome: Outcome) -> float:
    """Seconds from sending the request to the end of its answer."""
    return outcome.answer.end_s - outcome.answer.start_s


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles with linear interpolation; `None` if there are no values."""
    if not values:
        return None
    import numpy as np

    return {"mean": float(np.mean(values))} | {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def request_row(outcome: Outcome, begin_s: float) -> Row:
    """One JSON row of a request.

    Args:
        outcome: The request.
        begin_s: Start of the round, by `time.perf_counter`.
    """
    answer = outcome.answer
    return {
        "number": outcome.planned.number,
        "start_s": answer.start_s - begin_s,
        "late_s": outcome.late_s,
        "prompt_tokens": outcome.planned.num_prompt_tokens,
        "output_tokens": outcome.planned.num_output_tokens,
        "first_token_s": first_token_s(outcome) if answer.times_s else None,
        "end_to_end_s": end_to_end_s(outcome),
        "gaps_s": gaps_s(outcome),
        "kv_cache": answer.usage.get("kv_cache"),
        "error": answer.error,
    }


def _kv_cache(answered: Sequence[Outcome]) -> Row:
    """Sums over the requests whose answers have `usage.kv_cache`."""
    reported = [kv_cache for outcome in answered if (kv_cache := outcome.answer.usage.get("kv_cache"))]
    names = ("kept_tokens", "evicted_tokens", "compactions")
    sums = {name: sum(kv_cache[name] for kv_cache in reported) if reported else None for name in names}
    return {**sums, "memory_ratio": memory_of_all(reported) if reported else None}


def _watched(watch: Watch) -> Row:
    samples, counted = watch.samples, watch.counted
    queries = counted.get("vllm:prefix_cache_queries_total")
    kinds = {kind for sample in samples for kind in sample.memory}
    return {
        "running": _level([sample.running for sample in samples]),
        "waiting": _level([sample.waiting for sample in samples]),
        "kv_cache_usage": _level([sample.kv_cache_usage for sample in samples]),
        "preemptions": int(counted["vllm:num_preemptions_total"]) if "vllm:num_preemptions_total" in counted else None,
        "prefix_hits": counted["vllm:prefix_cache_hits_total"] / queries if queries else None,
        "memory": {kind: max(sample.memory.get(kind, 0) for sample in samples) for kind in sorted(kinds)},
        "own_metrics": _own(watch),
        "num_samples": len(samples),
        "num_samples_failed": watch.num_failed,
    }


def _level(found: Sequence[float | None]) -> Mapping[str, float] | None:
    values = [value for value in found if value is not None]
    return {"mean": sum(values) / len(values), "max": max(values)} if values else None


def _own(watch: Watch) -> dict[str, float]:
    """Metrics of vllm-l2kv: increases of counters, means of gauges."""
    counters = {name: value for name, value in watch.counted.items() if name.startswith(OWN_PREFIX)}
    names = {name for sample in watch.samples for name in sample.own if name not in counters}
    levels = {name: [sample.own[name] for sample in watch.samples if name in sample.own] for name in names}
    return dict(sorted(counters.items())) | {name: sum(v) / len(v) for name, v in sorted(levels.items())}
