"""docker/compose.yaml: its schema, and its agreement with the files beside it."""

import subprocess

import pytest
import yaml

from vllm_l2kv import __version__


@pytest.fixture(scope="module")
def compose(root):
    return yaml.safe_load((root / "docker" / "compose.yaml").read_text())


def test_schema(tool, root):
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "docker/compose.yaml"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_images_are_of_this_version(compose):
    images = {name: compose["services"][name]["image"] for name in ("server", "server-cpu")}
    assert images == {"server": f"vllm-l2kv:{__version__}", "server-cpu": f"vllm-l2kv:{__version__}-cpu"}


def test_one_profile_each_and_the_gpu_by_default(compose, root):
    profiles = {name: service.get("profiles") for name, service in compose["services"].items()}
    assert profiles == {"server": ["gpu"], "server-cpu": ["cpu"], "prometheus": None, "grafana": None}
    assert "COMPOSE_PROFILES=gpu" in (root / "docker" / ".env").read_text().splitlines()


def test_files_that_are_built_from_or_mounted_exist(compose, root):
    for service in compose["services"].values():
        if "build" in service:
            assert (root / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (root / "docker" / source).is_dir()


def test_prometheus_asks_the_server_and_grafana_prometheus(compose, root):
    prometheus = yaml.safe_load((root / "docker" / "prometheus" / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    (alias,) = compose["services"]["server"]["networks"]["default"]["aliases"]
    assert compose["services"]["server-cpu"]["networks"]["default"]["aliases"] == [alias]
    assert job["static_configs"] == [{"targets": [f"{alias}:8000"]}]
    provisioned = root / "docker" / "grafana" / "provisioning" / "datasources" / "prometheus.yaml"
    (source,) = yaml.safe_load(provisioned.read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
