"""SECURITY.md agrees with the code."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI

from vllm_l2kv.supported_vllm import vllm_version

if not vllm_version().startswith("0.32"):
    pytest.skip("the page names the paths of vLLM 0.32", allow_module_level=True)

from vllm.entrypoints.launchers.api_server.routers import register_api_routers
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX
from vllm_l2kv_server.body import MAX_DEPTH, MAX_VALUES
from vllm_l2kv_server.playground import PATH
from vllm_l2kv_server.request_fields import GENERATING_PATHS
from vllm_l2kv_server.serve import make_parser, parse
from vllm_l2kv_server.serve_options import DEFAULT_MAX_BODY_MIB, MAX_BODY_OPTION

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text()
KEY = PAGE[PAGE.index("## What a key guards") : PAGE.index("## What tenants")]


def test_bounds():
    said = dict(re.findall(r"^\| (\w[^|]*?) \| ([^|]*?) \| (?:400|413)", PAGE, re.MULTILINE))
    assert said["length of a body"] == f"{DEFAULT_MAX_BODY_MIB} MiB, or `{MAX_BODY_OPTION}`"
    assert said["levels of arrays and objects in a JSON body"] == str(MAX_DEPTH)
    assert said["items of arrays and objects in a JSON body, apart from token ids"] == f"{MAX_VALUES:,}"


def test_what_a_key_guards():
    (guarded,) = re.findall(r"paths that begin with (.*?)\.\s+Every", KEY, re.DOTALL)
    assert tuple(re.findall(r"`(/\w+)`", guarded)) == GUARDED_PREFIX


def test_every_open_path_is_named(monkeypatch):
    """Paths of vLLM's own app for a generating model, without developer variables."""
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE", raising=False)
    app = FastAPI()
    app.state.args = parse(make_parser(), ["m"])
    register_api_routers(app.state.args, app, ("generate",), SimpleNamespace(get_pooling_task=lambda tasks: None))
    paths = {route.path for route in app.routes} | {PATH, *GENERATING_PATHS}
    _, others = re.split(r"Every\s+other\s+path", KEY)
    named = set(re.findall(r"`(/[\w.]+)`", others)) - {"/v1"}  # the advice to a proxy
    assert named == {path for path in paths if not path.startswith((*GUARDED_PREFIX, "/docs/"))}


def test_templates_of_requests_are_not_trusted_by_default():
    assert parse(make_parser(), ["m"]).trust_request_chat_template is False


def test_files_exist():
    named = re.findall(r"`((?:tests|docs)/[\w./]*)`", PAGE)
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]
