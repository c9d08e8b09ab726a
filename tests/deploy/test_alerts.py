"""The alert rules, with the series of alerts.yml in place of a server."""

import subprocess

import yaml


def promtool(folder, *words: str) -> None:
    done = subprocess.run([folder / "promtool", *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration(prometheus_folder, root):
    promtool(prometheus_folder, "check", "config", str(root / "docker" / "prometheus" / "prometheus.yml"))


def test_alerts_fire_when_they_must_and_not_otherwise(prometheus_folder, root):
    promtool(prometheus_folder, "test", "rules", str(root / "tests" / "deploy" / "alerts.yml"))


def test_no_alert_is_untested_or_unexplained(root):
    (group,) = yaml.safe_load((root / "docker" / "prometheus" / "alerts.yml").read_text())["groups"]
    tested = (root / "tests" / "deploy" / "alerts.yml").read_text()
    guide = (root / "docs" / "operating.md").read_text()
    for rule in group["rules"]:
        assert f'alertname="{rule["alert"]}"' in tested
        assert f"`{rule['alert']}`" in guide
