"""Metrics of compression on `/metrics`, beside vLLM's own and with the same labels.

They come from the engine's stats (`vllm_l2kv.messages.stats`) and from the requests that this API process answers. The
Prometheus client sums over API processes.
"""

import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from itertools import product
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_l2kv import __version__
from vllm_l2kv.messages.stats import take_stats
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import Kind
from vllm_l2kv.settings import Settings
from vllm_l2kv.supported_vllm import vllm_version

PREFIX = "vllm_l2kv:"
LABELS = ("model_name", "engine")
TENTHS = [i / 10 for i in range(1, 11)]
ROWS = [2**i for i in range(4, 21)]
BUDGETS = [2**i for i in range(8, 17)]
"""Values of the label `budget`, see `budget_label`."""
DEVICE_SECONDS = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3, 10]
FIRST_TOKEN_SECONDS = [0.01, 0.03, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200]
OUTPUT_TOKEN_SECONDS = [0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2]
REQUEST_SECONDS = [0.3, 0.5, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200, 400, 800, 1600]


class EngineMetrics(AggregateStatLoggerBase):
    """Metrics of compactions, from the stats that the engines report.

    Args:
        vllm_config: vLLM's configuration.
        engine_indexes: The engines that report to this process.
    """

    def __init__(self, vllm_config: Any, engine_indexes: Sequence[int]) -> None:
        self._model = vllm_config.model_config.served_model_name
        self._compressed = Counter(f"{PREFIX}requests_compressed", "Requests that were compacted, each once.", LABELS)
        by_kind = (*LABELS, "kind")
        self._compactions = Counter(
            f"{PREFIX}compactions",
            "Compactions: by ratio, at the end of a document, or by budget in the prompt or in the answer.",
            by_kind,
        )
        self._kept = Counter(f"{PREFIX}rows_kept", "Rows that each head of a compressed layer kept.", by_kind)
        self._evicted = Counter(f"{PREFIX}rows_evicted", "Rows that each head of a compressed layer evicted.", by_kind)
        self._freed = Counter(
            f"{PREFIX}blocks_freed", "KV-cache blocks that compactions gave back to the pool.", LABELS
        )
        self._taken = Counter(f"{PREFIX}blocks_taken", "KV-cache blocks that compactions took for kept rows.", LABELS)
        self._preempted = Counter(
            f"{PREFIX}compaction_preemptions", "Requests preempted to free blocks for a compaction.", LABELS
        )
        self._published = Counter(
            f"{PREFIX}compactions_published",
            "Compactions whose rows later requests can find in the prefix cache.",
            LABELS,
        )
        self._found = Counter(
            f"{PREFIX}found_tokens", "Prompt tokens whose compressed rows were found in the prefix cache.", LABELS
        )
        self._kept_of_compaction = Histogram(
            f"{PREFIX}compaction_kept_rows", "Rows that each head kept, per compaction.", by_kind, buckets=ROWS
        )
        self._seconds = Histogram(
            f"{PREFIX}compaction_device_seconds",
            "Device time of all compactions of a step.",
            LABELS,
            buckets=DEVICE_SECONDS,
        )
        self._logical = self._gauge("logical_tokens", "Tokens of running requests.")
        self._physical = self._gauge("physical_tokens", "Rows that running requests hold in compressed layers.")
        self._memory = self._gauge(
            "memory_ratio",
            "Memory of the whole cache that running requests hold, relative to uncompressed; 1 if none runs.",
        )
        of_kinds: list[Any] = [self._compactions, self._kept, self._evicted, self._kept_of_compaction]
        metrics = [metric for metric in vars(self).values() if isinstance(metric, Counter | Gauge | Histogram)]
        for index in engine_indexes:
            # Exports 0 before the first event.
            for metric in metrics:
                if metric not in of_kinds:
                    metric.labels(self._model, index)
            for metric, kind in product(of_kinds, Kind):
                metric.labels(self._model, index, kind)
            self._memory.labels(self._model, index).set(1)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Adds the stats of one step of an engine."""
        stats = take_stats(scheduler_stats) if scheduler_stats is not None else None
        if stats is None:
            return
        labels = self._model, engine_idx
        for event in stats.compactions:
            of_kind = (*labels, event.kind)
            self._compactions.labels(*of_kind).inc()
            self._kept.labels(*of_kind).inc(event.num_kept)
            self._evicted.labels(*of_kind).inc(event.num_evicted)
            self._kept_of_compaction.labels(*of_kind).observe(event.num_kept)
        for seconds in stats.seconds:
            self._seconds.labels(*labels).observe(seconds)
        for counter, number in (
            (self._compressed, stats.num_compressed),
            (self._freed, stats.num_freed_blocks),
            (self._taken, stats.num_taken_blocks),
            (self._preempted, stats.num_preempted),
            (self._published, stats.num_published),
            (self._found, stats.num_found_tokens),
        ):
            if number:
                counter.labels(*labels).inc(number)
        self._logical.labels(*labels).set(stats.logical_tokens)
        self._physical.labels(*labels).set(stats.physical_tokens)
        self._memory.labels(*labels).set(stats.memory_ratio)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""

    @staticmethod
    def _gauge(name: str, documentation: str) -> Gauge:
        return Gauge(PREFIX + name, documentation, LABELS, multiprocess_mode="mostrecent")


class RequestMetrics:
    """Metrics of this process: versions, and keep ratios, budgets and latencies of the requests that it answers.

    Args:
        vllm_config: vLLM's configuration.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._model = vllm_config.model_config.served_model_name
        versions = Gauge(
            f"{PREFIX}versions",
            "1; the versions of a server are in the labels.",
            ["vllm_l2kv", "vllm"],
            multiprocess_mode="max",
        )
        versions.labels(__version__, vllm_version()).set(1)
        self._keep_ratio = Histogram(
            f"{PREFIX}request_keep_ratio", "Keep ratio of each request.", ["model_name"], buckets=[0.01, 0.05, *TENTHS]
        )
        self._budget = Histogram(
            f"{PREFIX}request_budget_rows",
            "Budget (kv_max_tokens) of each request that has one.",
            ["model_name"],
            buckets=ROWS,
        )
        self._budget.labels(self._model)  # exports 0 before the first one
        labels = ["model_name", "keep_ratio", "budget"]
        self._first_token, self._output_token, self._request = (
            Histogram(f"{PREFIX}{name}_seconds", f"{text} By keep ratio and budget.", labels, buckets=buckets)
            for name, text, buckets in (
                ("time_to_first_token", "Time to first token.", FIRST_TOKEN_SECONDS),
                ("time_per_output_token", "Mean time between a request's output tokens.", OUTPUT_TOKEN_SECONDS),
                ("e2e_request_latency", "Time from arrival to the end of the answer.", REQUEST_SECONDS),
            )
        )

    async def observe(self, outputs: AsyncIterator[Any], params: CompressionParams) -> AsyncIterator[Any]:
        """Yields a request's outputs and measures its latencies; an aborted request has none.

        Args:
            outputs: The async generator of the engine client.
            params: What applies to the request.
        """
        self._keep_ratio.labels(self._model).observe(params.keep_ratio)
        if params.max_tokens is not None:
            self._budget.labels(self._model).observe(params.max_tokens)
        # Closed together with this generator, so that vLLM aborts the request of a client that has disconnected.
        async with aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                if output.finished and output.metrics is not None:
                    self._finished(output.metrics, params)
                yield output

    def _finished(self, times: Any, params: CompressionParams) -> None:
        labels = self._model, tenth_of(params.keep_ratio), budget_label(params.max_tokens)
        self._first_token.labels(*labels).observe(times.first_token_latency)
        self._request.labels(*labels).observe(time.time() - times.arrival_time)
        if times.num_generation_tokens > 1:
            decoding = times.last_token_ts - times.first_token_ts
            self._output_token.labels(*labels).observe(decoding / (times.num_generation_tokens - 1))


def add_metrics(engine_client: Any, settings: Settings) -> RequestMetrics | None:
    """Adds the metrics to vLLM's.

    Returns:
        `None` if vLLM has no metrics (`--disable-log-stats`) or the engine reports none (`Settings.metrics`).
    """
    loggers = engine_client.logger_manager
    if loggers is None or not settings.metrics:
        return None
    # Before vLLM's own loggers, which would read the stats of vllm-l2kv as those of a KV connector.
    loggers.stat_loggers.insert(0, EngineMetrics(engine_client.vllm_config, loggers.engine_indexes))
    return RequestMetrics(engine_client.vllm_config)


def tenth_of(keep_ratio: float) -> str:
    """Returns the label of a keep ratio, one of ten, so that clients cannot create many time series."""
    return f"{max(math.ceil(round(keep_ratio * 10, 6)), 1) / 10:.1f}"


def budget_label(budget: int | None) -> str:
    """Returns the label of a budget: `none`, the budget rounded up to one of `BUDGETS`, or `more`."""
    return "none" if budget is None else next((str(bound) for bound in BUDGETS if budget <= bound), "more")
