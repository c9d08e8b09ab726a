"""The first requests that a new user pastes."""

import ast
import asyncio
import json
import shlex
from argparse import Namespace
from types import SimpleNamespace

import pytest
from starlette.datastructures import State
from vllm_l2kv_server.welcome import LAST_LINE, READY, announce_when_ready, welcome_text


def arguments(**given) -> Namespace:
    return Namespace(**{"host": None, "port": 8123, "api_key": None, "ssl_certfile": None, "uds": None, **given})


def curl_of(text: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith("curl ")]
    return shlex.split(line)


def test_curl_and_python_can_be_pasted(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    text = welcome_text(arguments(), 'a "model"')
    curl = curl_of(text)
    assert curl[1] == "http://localhost:8123/v1/chat/completions"
    assert json.loads(curl[-1])["kv_keep_ratio"] == 0.5
    assert '"kv_keep_ratio": 0.5, "kv_protect_last": 16}' in text[text.index("extra_body") :]
    assert json.loads(curl[-1])["model"] == 'a "model"'
    assert "Authorization" not in text
    python = text[text.index("from openai") : text.index(LAST_LINE)]
    assert 'base_url="http://localhost:8123/v1"' in ast.unparse(ast.parse(python)).replace("'", '"')


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({"host": "0.0.0.0"}, "http://localhost:8123"),
        ({"host": "10.0.0.7"}, "http://10.0.0.7:8123"),
        ({"host": "::1"}, "http://[::1]:8123"),
        ({"ssl_certfile": "cert.pem"}, "https://localhost:8123"),
    ],
)
def test_url(given, url):
    assert curl_of(welcome_text(arguments(**given), "m"))[1].startswith(url + "/v1/")


def test_the_key_is_never_shown(monkeypatch):
    assert "sesame" not in welcome_text(arguments(api_key=["sesame"]), "m")
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    text = welcome_text(arguments(), "m")
    assert "sesame" not in text
    assert "Authorization: Bearer YOUR_API_KEY" in curl_of(text)


@pytest.mark.parametrize(("given", "shown"), [({}, True), ({"playground": True}, True), ({"playground": False}, False)])
def test_the_page_is_named_where_there_is_one(given, shown):
    assert ("http://localhost:8123/playground" in welcome_text(arguments(**given), "m")) is shown


def test_printed_once_the_server_has_started(capsys):
    async def run():
        state = State()
        task = asyncio.create_task(announce_when_ready(state, arguments(), "m"))
        await asyncio.sleep(0.15)
        state.server = SimpleNamespace(started=False)
        await asyncio.sleep(0.15)
        assert capsys.readouterr().out == ""
        state.server.started = True
        await task

    asyncio.run(run())
    text = capsys.readouterr().out
    assert "curl http://localhost:8123" in text
    # `screen` recognizes the text by both.
    assert (text.splitlines()[1].startswith(READY), text.splitlines()[-1]) == (True, LAST_LINE)
