"""The demo model by its name, and as the default, in every command that takes a model."""

from pathlib import Path

import pytest
from vllm_l2kv_server import serve
from vllm_l2kv_server.start_checks import StartError

from vllm_l2kv.cli import main
from vllm_l2kv.tools import demo_model
from vllm_l2kv.tools.evaluation import run
from vllm_l2kv.tools.plan import report
from vllm_l2kv.tools.profile import make

COMMANDS = {
    "serve": (["serve"], ["--port", "0"]),
    "eval": (["eval", "passkey"], []),
    "profile": (["profile"], []),
    "plan": (["plan"], ["--kv-cache-gib", "1", "--context", "100", "--output", "10"]),
}


@pytest.fixture(autouse=True)
def stopped_at_the_model(monkeypatch, tmp_path):
    """Makes commands stop and report the model that they would use."""

    def stop(model, *_, **__):
        model = getattr(model, "model", model)
        raise StartError(f"it would be {model}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_model, "ensure_demo_model", lambda: Path("/cache/demo"))
    monkeypatch.setattr(serve, "check_parsed", stop)
    monkeypatch.setattr(run, "Engine", stop)
    monkeypatch.setattr(make, "make", stop)
    monkeypatch.setattr(report, "report", stop)


def taken(capsys, command: str, *model: str) -> str:
    before, after = COMMANDS[command]
    with pytest.raises(SystemExit) as caught:
        main([*before, *model, *after])
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition("it would be ")[2]


@pytest.mark.parametrize("command", COMMANDS)
class TestCommand:
    def test_named(self, capsys, command):
        assert taken(capsys, command, "SmolLM2-135M-Instruct") == "/cache/demo"

    def test_none(self, capsys, command):
        assert taken(capsys, command) == "/cache/demo"

    def test_another(self, capsys, command):
        assert taken(capsys, command, "owner/name") == "owner/name"

    def test_a_folder_of_that_name(self, capsys, tmp_path, command):
        (tmp_path / "SmolLM2-135M-Instruct").mkdir()
        (tmp_path / "SmolLM2-135M-Instruct" / "config.json").touch()
        assert taken(capsys, command, "SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct"

    def test_it_is_unavailable(self, capsys, monkeypatch, command):
        def fail():
            raise demo_model.DemoModelError("The demo model cannot be downloaded: no network.")

        monkeypatch.setattr(demo_model, "ensure_demo_model", fail)
        before, after = COMMANDS[command]
        with pytest.raises(SystemExit) as caught:
            main([*before, *after])
        assert caught.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith("The demo model cannot be downloaded: no network.")
