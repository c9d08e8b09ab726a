"""Metrics of vllm-l2kv, from the stats of an engine and from the requests of a process."""

import asyncio
import inspect
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics import loggers
from vllm.v1.metrics.stats import RequestStateStats, SchedulerStats
from vllm_l2kv_server.metrics import PREFIX, EngineMetrics, RequestMetrics, add_metrics, budget_label, tenth_of

import vllm_l2kv
from vllm_l2kv.messages.stats import CompactionEvent, CompactionStats, attach_stats
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.settings import Settings
from vllm_l2kv.supported_vllm import vllm_version

CONFIG = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))


@pytest.fixture(autouse=True)
def registry():
    """Unregisters a test's metrics after it."""
    before = set(REGISTRY._collector_to_names)
    yield
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(PREFIX + name, {"model_name": "m", **labels})


def scheduler_stats(**fields) -> SchedulerStats:
    stats = SchedulerStats()
    attach_stats(stats, CompactionStats(**fields))
    return stats


def test_all_metrics_exist_before_the_first_event():
    EngineMetrics(CONFIG, [0, 1])
    for engine in ("0", "1"):
        assert value("requests_compressed_total", engine=engine) == 0
        assert value("found_tokens_total", engine=engine) == value("compactions_published_total", engine=engine) == 0
        for kind in ("ratio", "document", "prompt_budget", "answer_budget"):
            assert value("compactions_total", engine=engine, kind=kind) == 0
            assert value("compaction_kept_rows_count", engine=engine, kind=kind) == 0
        assert value("compaction_device_seconds_count", engine=engine) == 0
        assert value("memory_ratio", engine=engine) == 1


def test_the_versions_of_a_server():
    RequestMetrics(CONFIG)
    labels = {"vllm_l2kv": vllm_l2kv.__version__, "vllm": vllm_version()}
    assert REGISTRY.get_sample_value(f"{PREFIX}versions", labels) == 1


def test_the_fake_server_of_load_tests_has_real_metrics():
    """Otherwise `bench` would be tested with names that no server has."""
    fake = (Path(__file__).parents[1] / "bench" / "fake_vllm.py").read_text()
    names = set(re.findall(r"^# TYPE (vllm\w*:\w+) \w+$", fake, re.MULTILINE))
    EngineMetrics(CONFIG, [0])
    ours = {name for name in REGISTRY._names_to_collectors if name.startswith(PREFIX)}
    theirs = set(re.findall(r'name="(vllm:\w+)"', inspect.getsource(loggers)))
    assert len(names) > 7
    assert {name for name in names if name.startswith(PREFIX)} <= ours
    assert {name.removesuffix("_total") for name in names if not name.startswith(PREFIX)} <= theirs


def test_stats_of_engines_add_up_and_gauges_follow():
    metrics = EngineMetrics(CONFIG, [0, 1])
    ratio, budget = CompactionEvent("ratio", 50, 30), CompactionEvent("answer_budget", 25, 75)
    reported = {"compactions": [ratio, budget], "num_compressed": 2, "num_freed_blocks": 8, "num_taken_blocks": 5}
    metrics.record(scheduler_stats(**reported, seconds=[0.5], logical_tokens=210, physical_tokens=84), None)
    metrics.record(scheduler_stats(compactions=[budget], num_preempted=1, num_found_tokens=700), None)
    metrics.record(scheduler_stats(num_published=2, num_found_tokens=300), None)
    metrics.record(scheduler_stats(compactions=[ratio], num_compressed=1), None, engine_idx=1)
    assert value("requests_compressed_total", engine="0") == 2
    assert value("requests_compressed_total", engine="1") == 1
    for kind, count, kept, evicted in (
        ("ratio", 1, 50, 30),
        ("document", 0, 0, 0),
        ("prompt_budget", 0, 0, 0),
        ("answer_budget", 2, 50, 150),
    ):
        labels = {"engine": "0", "kind": kind}
        assert value("compactions_total", **labels) == value("compaction_kept_rows_count", **labels) == count
        assert value("rows_kept_total", **labels) == value("compaction_kept_rows_sum", **labels) == kept
        assert value("rows_evicted_total", **labels) == evicted
    assert value("rows_kept_total", engine="1", kind="ratio") == 50
    assert value("blocks_freed_total", engine="0") == 8
    assert value("blocks_taken_total", engine="0") == 5
    assert value("compaction_preemptions_total", engine="0") == 1
    assert value("compactions_published_total", engine="0") == 2
    assert value("found_tokens_total", engine="0") == 1000
    assert value("found_tokens_total", engine="1") == 0
    assert value("compaction_device_seconds_sum", engine="0") == 0.5
    assert value("logical_tokens", engine="0") == value("physical_tokens", engine="0") == 0
    assert value("memory_ratio", engine="0") == 1
    metrics.record(scheduler_stats(logical_tokens=210, physical_tokens=84, memory_ratio=0.44), None)
    assert value("memory_ratio", engine="0") == 0.44


def test_stats_are_taken_out_before_vllm_reads_them():
    stats = scheduler_stats()
    EngineMetrics(CONFIG, [0]).record(stats, None)
    assert stats.kv_connector_stats is None


def test_other_stats_stay():
    metrics = EngineMetrics(CONFIG, [0])
    stats = SchedulerStats(kv_connector_stats={"Other": {}})
    metrics.record(stats, None)
    metrics.record(None, None)
    assert stats.kv_connector_stats == {"Other": {}}


async def outputs_of(*outputs):
    for output in outputs:
        yield output


def observe(metrics: RequestMetrics, params: CompressionParams, *outputs):
    async def gather():
        return [output async for output in metrics.observe(outputs_of(*outputs), params)]

    return asyncio.run(gather())


def test_a_finished_request_is_measured_under_its_ratio_and_budget():
    metrics = RequestMetrics(CONFIG)
    times = RequestStateStats(
        num_generation_tokens=5,
        arrival_time=time.time() - 7,
        first_token_latency=0.25,
        first_token_ts=100.0,
        last_token_ts=102.0,
    )
    outputs = [SimpleNamespace(finished=i == 2, metrics=times) for i in range(3)]
    assert value("request_budget_rows_count") == 0
    assert observe(metrics, CompressionParams(0.25, max_tokens=1000), *outputs) == outputs
    labels = {"keep_ratio": "0.3", "budget": "1024"}
    assert value("time_to_first_token_seconds_sum", **labels) == 0.25
    assert value("time_to_first_token_seconds_count", **labels) == 1
    assert value("time_per_output_token_seconds_sum", **labels) == 0.5
    assert 7 <= value("e2e_request_latency_seconds_sum", **labels) < 60
    assert value("request_keep_ratio_sum") == 0.25
    assert value("request_budget_rows_sum") == 1000


def test_one_token_has_no_time_between_tokens_and_an_abort_no_latency():
    metrics = RequestMetrics(CONFIG)
    one = RequestStateStats(num_generation_tokens=1, arrival_time=time.time(), first_token_latency=1.0)
    observe(metrics, CompressionParams(), SimpleNamespace(finished=True, metrics=one))
    observe(metrics, CompressionParams(0.5), SimpleNamespace(finished=False, metrics=one))
    assert value("time_to_first_token_seconds_count", keep_ratio="1.0", budget="none") == 1
    assert value("time_per_output_token_seconds_count", keep_ratio="1.0", budget="none") is None
    assert value("time_to_first_token_seconds_count", keep_ratio="0.5", budget="none") is None
    assert value("request_keep_ratio_count") == 2
    assert value("request_budget_rows_count") == 0


def test_the_engines_generator_closes_when_the_client_disconnects():
    closed = []

    async def outputs():
        try:
            yield SimpleNamespace(finished=False, metrics=None)
            yield SimpleNamespace(finished=False, metrics=None)
        finally:
            closed.append(True)

    async def leave():
        stream = RequestMetrics(CONFIG).observe(outputs(), CompressionParams())
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    assert closed == [True]


@pytest.mark.parametrize(
    ("ratio", "tenth"), [(1.0, "1.0"), (0.5, "0.5"), (0.3, "0.3"), (0.7, "0.7"), (0.25, "0.3"), (1e-9, "0.1")]
)
def test_ratios_are_rounded_up_to_tenths(ratio, tenth):
    assert tenth_of(ratio) == tenth


@pytest.mark.parametrize(
    ("budget", "label"),
    [(None, "none"), (1, "256"), (256, "256"), (257, "512"), (4096, "4096"), (2**16, "65536"), (2**16 + 1, "more")],
)
def test_budgets_are_rounded_up_to_few(budget, label):
    assert budget_label(budget) == label


@pytest.mark.parametrize(("has_loggers", "tells"), [(False, True), (True, False)])
def test_no_metrics_if_vllm_has_none_or_the_engine_reports_none(has_loggers, tells):
    loggers = SimpleNamespace(stat_loggers=[], engine_indexes=[0]) if has_loggers else None
    client = SimpleNamespace(logger_manager=loggers, vllm_config=CONFIG)
    assert add_metrics(client, Settings(metrics=tells)) is None
    assert not has_loggers or loggers.stat_loggers == []


def test_its_logger_runs_before_vllms():
    loggers = SimpleNamespace(stat_loggers=["vllm's"], engine_indexes=[0])
    assert add_metrics(SimpleNamespace(logger_manager=loggers, vllm_config=CONFIG), Settings(metrics=True))
    assert isinstance(loggers.stat_loggers[0], EngineMetrics)
    assert loggers.stat_loggers[1:] == ["vllm's"]
