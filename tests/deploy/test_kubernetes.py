"""The manifests: schemas, and their agreement with each other. No cluster is needed."""

import json
import subprocess

import pytest
import yaml

from vllm_l2kv import __version__, engine_args
from vllm_l2kv.settings import Settings


@pytest.fixture(scope="module")
def folder(root):
    return root / "docker" / "kubernetes"


@pytest.fixture(scope="module")
def server(folder) -> dict[str, dict]:
    return {each["kind"]: each for each in yaml.safe_load_all((folder / "server.yaml").read_text())}


@pytest.fixture(scope="module")
def model(folder) -> dict:
    """Returns the only model in the chart's values."""
    (model,) = yaml.safe_load((folder / "production-stack-values.yaml").read_text())["servingEngineSpec"]["modelSpec"]
    return model


def test_schema(tool, folder):
    command = [tool("kubernetes-validate"), "--strict", str(folder / "server.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARN" not in done.stdout + done.stderr


def test_names_lead_to_each_other(server, folder):
    deployment, service = server["Deployment"]["spec"], server["Service"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    (container,) = deployment["template"]["spec"]["containers"]
    volumes = {volume["name"]: volume for volume in deployment["template"]["spec"]["volumes"]}
    assert set(volumes) == {mount["name"] for mount in container["volumeMounts"]}
    claim = volumes["cache"]["persistentVolumeClaim"]
    assert claim["claimName"] == server["PersistentVolumeClaim"]["metadata"]["name"]
    assert container["image"] == f"vllm-l2kv:{__version__}"
    monitor = yaml.safe_load((folder / "monitoring.yaml").read_text())["spec"]
    assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
    assert [each["port"] for each in monitor["endpoints"]] == [service["spec"]["ports"][0]["name"]]


def test_alerts_know_the_job(server, root):
    """The operator names a job after its service."""
    (job,) = yaml.safe_load((root / "docker" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert server["Service"]["metadata"]["name"] == job["job_name"]


def test_it_runs_as_the_user_of_the_image(server):
    pod = server["Deployment"]["spec"]["template"]["spec"]
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (2000, 0)
    (cache,) = (each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "cache")
    assert cache["mountPath"] == "/home/vllm/.cache"


def test_the_chart_gets_what_vllm_l2kv_serve_sets(model):
    from vllm_l2kv.plugin import GPU_WORKER_CLS, SCHEDULER_CLS

    words = model["vllmConfig"]["extraArgs"]
    options = dict(zip(words[::2], words[1::2], strict=True))
    config = options.pop("--additional-config")
    assert options == {"--scheduler-cls": SCHEDULER_CLS, "--worker-cls": GPU_WORKER_CLS}
    assert Settings.from_config(json.loads(config)) == Settings.from_config(
        engine_args(metrics=True)["additional_config"]
    )
    assert {"name": "VLLM_PLUGINS", "value": "l2kv"} in model["env"]
    assert model["tag"] == __version__
