"""The dashboard and the alerts on a Prometheus that scrapes the real server."""

import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from http_server import Server, free_port

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "vllm-l2kv.json").read_text())
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}
# Values that Grafana substitutes for variables.
VARIABLES = {"$model_name": ".*", "$instance": ".*", "$__rate_interval": "1m"}
SCRAPE_SECONDS = 1
ASKED = [
    *({"kv_keep_ratio": ratio} for ratio in (1.0, 0.5, 0.3, None)),
    {"kv_max_tokens": 40},  # with the answer's interval less than the prompt
    {"kv_keep_ratio": 0.5, "kv_prefix_tokens": 200},
]
MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def prometheus(server, prometheus_folder, tmp_path_factory) -> Iterator[httpx.Client]:
    """Prometheus with the project's configuration and rules, after it has scraped two rounds of requests."""
    folder = tmp_path_factory.mktemp("prometheus")
    source = ROOT / "docker" / "prometheus"
    config = yaml.safe_load((source / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"}
    config["rule_files"] = [str(source / "alerts.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [prometheus_folder / "prometheus", f"--config.file={folder / 'prometheus.yml'}"]
    options = [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://{address}/api/v1", timeout=30) as client:
            until(lambda: client.get("/targets").is_success, "Prometheus started")
            for _ in range(2):  # a rate needs a series from before and one from after
                ask(server)
                seen(client, server)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def ask(server: Server) -> None:
    """Sends requests at every ratio, with a budget, and one that is refused."""
    body = {"model": MODEL, "prompt": list(range(100, 400)), "max_tokens": 16, "ignore_eos": True}
    post = lambda more: httpx.post(f"{server.url}/v1/completions", json=body | more, timeout=120)  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        assert {answer.status_code for answer in pool.map(post, ASKED * 4)} == {200}
    assert post({"kv_keep_ratio": 7}).status_code == 400


def seen(client: httpx.Client, server: Server) -> None:
    """Waits until Prometheus has scraped the server's present counts."""
    counted = server.metrics()["vllm:generation_tokens_total"]
    until(lambda: values(client, "sum(vllm:generation_tokens_total)") == [counted], "the counts were scraped")


def until(holds, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(SCRAPE_SECONDS / 4)


def values(client: httpx.Client, query: str) -> list[float]:
    answer = client.get("/query", params={"query": query}).json()
    assert answer["status"] == "success", answer
    return [float(series["value"][1]) for series in answer["data"]["result"]]


def filled_in(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


@pytest.mark.slow
@pytest.mark.parametrize("title", sorted(PANELS))
def test_every_query_of_a_panel_has_data(prometheus, title):
    for target in PANELS[title]["targets"]:
        found = values(prometheus, filled_in(target["expr"]))
        assert any(math.isfinite(value) for value in found), target["expr"]


@pytest.mark.parametrize(
    ("label", "title", "told_apart"),
    [
        ("keep_ratio", "Time to first token", {"1.0", "0.5", "0.3"}),
        ("keep_ratio", "Time per output token", {"1.0", "0.5", "0.3"}),
        ("keep_ratio", "Whole request", {"1.0", "0.5", "0.3"}),
        ("budget", "Time to first token by budget", {"none", "256"}),
        ("budget", "Time per output token by budget", {"none", "256"}),
        ("kind", "Compactions by kind", {"ratio", "answer_budget"}),
    ],
)
@pytest.mark.slow
def test_panels_separate_kinds_ratios_and_budgets(prometheus, label, title, told_apart):
    (target,) = PANELS[title]["targets"]
    query = f"count by ({label}) ({filled_in(target['expr'])} > 0)"
    answer = prometheus.get("/query", params={"query": query}).json()
    # Other tests may have sent requests to this server too.
    assert {series["metric"][label] for series in answer["data"]["result"]} >= told_apart


@pytest.mark.slow
def test_a_document_is_found(prometheus):
    prompt, found = (
        values(prometheus, filled_in(target["expr"]))
        for target in PANELS["Prompt tokens, and those found compressed"]["targets"]
    )
    assert 0 < sum(found) < sum(prompt)


@pytest.mark.slow
def test_variables_offer_the_existing_values(prometheus, server):
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, _, label = variable["definition"].removeprefix("label_values(").removesuffix(")").partition(", ")
            answer = prometheus.get(f"/label/{label}/values", params={"match[]": metric}).json()
            assert answer["data"] == [{"model_name": MODEL, "instance": server.url.removeprefix("http://")}[label]]


@pytest.mark.slow
def test_every_alert_is_evaluated(prometheus):
    (group,) = prometheus.get("/rules").json()["data"]["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert not [rule["name"] for rule in group["rules"] if rule["state"] == "firing"]


def test_panels_and_targets_are_whole():
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS.values():
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0


def test_every_metric_is_explained():
    expressions = [target["expr"] for panel in PANELS.values() for target in panel["targets"]]
    (group,) = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yml").read_text())["groups"]
    expressions += [rule["expr"] for rule in group["rules"]]
    used = set(re.findall(r"(?:vllm(?:_l2kv)?:|http_)\w+", " ".join(expressions)))
    guide = (ROOT / "docs" / "metrics.md").read_text()
    assert not [name for name in used if f"`{name.removesuffix('_bucket')}`" not in guide]
