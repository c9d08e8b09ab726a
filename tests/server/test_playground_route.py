"""The playground's files and headers, as the server sends them."""

import asyncio
import re
from argparse import Namespace

import httpx
import pytest
from fastapi import FastAPI
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm_l2kv_server.app import KVCompressionEndpoints
from vllm_l2kv_server.playground import INDEX, MEDIA_TYPES, STATIC

FILES = {"/playground": INDEX, **{f"/playground/{path.name}": path for path in STATIC.iterdir() if path != INDEX}}


def make_app(**args) -> FastAPI:
    app = FastAPI()
    app.state.args = Namespace(**args)
    KVCompressionEndpoints().attach_router(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["sesame"])
    return app


def request(method: str, path: str, **args) -> httpx.Response:
    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(**args)), base_url="http://test") as client:
            return await client.request(method, path)

    return asyncio.run(run())


@pytest.mark.parametrize("path", FILES)
def test_served_without_a_key(path):
    response = request("GET", path)
    assert response.status_code == 200
    assert response.content == FILES[path].read_bytes()
    assert response.headers["content-type"].partition(";")[0] == MEDIA_TYPES[FILES[path].suffix]
    assert request("GET", "/v1/kv_compression").status_code == 401


@pytest.mark.parametrize("path", FILES)
def test_only_the_servers_own_files_may_run(path):
    headers = request("GET", path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
    assert (policy["connect-src"], policy["form-action"], policy["frame-ancestors"]) == ("'self'", "'none'", "'none'")
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_only_read(method, path):
    assert request(method, path).status_code == 405


@pytest.mark.parametrize("path", FILES)
def test_head(path):
    response = request("HEAD", path)
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) == FILES[path].stat().st_size


@pytest.mark.parametrize("path", [*FILES, "/playground/"])
def test_off(path):
    assert request("GET", path, playground=False).status_code == 404
    assert request("GET", path, playground=True).status_code in (200, 307)


@pytest.mark.parametrize(
    "path", ["/playground/index.html", "/playground/nothing.js", "/playground/..%2Fapp.py", "/playground/../app.py"]
)
def test_other_paths_are_not_found(path):
    assert request("GET", path).status_code == 404


def test_a_trailing_slash_is_redirected_by_a_relative_address():
    response = request("GET", "/playground/")
    assert response.status_code == 307
    assert response.headers["location"] == "../playground"
    assert response.next_request.url == "http://test/playground"


def test_not_among_the_calls_that_openapi_shows():
    assert not [path for path in request("GET", "/openapi.json").json()["paths"] if "playground" in path]


def test_addresses_are_relative_and_on_this_server():
    """So that they work offline, and behind a proxy that adds a path."""
    linked = re.findall(r'(?:href|src)="([^"]*)"', INDEX.read_text())
    assert {f"/{address}" for address in linked} <= FILES.keys()
    for path in STATIC.iterdir():
        assert not re.search(r"""["'(](https?:)?//(?!www\.w3\.org/2000/svg)""", path.read_text()), path


def test_nothing_inline():
    page = INDEX.read_text()
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=|javascript:", page)


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.js")), ids=lambda path: path.name)
def test_answers_are_never_read_as_html(path):
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(", path.read_text()
    )
