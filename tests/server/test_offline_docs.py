"""`/docs` in a browser without access to other hosts."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn
from chromium import Page, find_chromium
from vllm.entrypoints.openai.api_server import build_app
from vllm.entrypoints.serve.instrumentator import offline_docs
from vllm.envs import disable_envs_cache
from vllm_l2kv_server.serve import make_parser, parse

BROWSER = find_chromium()
SCRIPT = Path(offline_docs.__file__).parent / "static" / "swagger-ui-bundle.js"
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium, such as Debian's package chromium"),
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs vLLM's static files, which its Python files lack"),
]


@pytest.fixture
def port(monkeypatch) -> Iterator[int]:
    """Port of vLLM's app with the routes of vllm-l2kv, without an engine."""
    monkeypatch.setenv("VLLM_PLUGINS", "l2kv")
    disable_envs_cache()
    app = build_app(parse(make_parser(), ["m"]), ("generate",))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def test_the_fields_are_shown(port, tmp_path):
    with Page(BROWSER, tmp_path) as page:
        page.open(f"http://127.0.0.1:{port}/docs")
        page.wait_for("document.querySelectorAll('.opblock').length > 5")
        chat = (
            "[...document.querySelectorAll('.opblock')].find(part => part.innerText.includes('/v1/chat/completions'))"
        )
        page.evaluate(f"{chat}.querySelector('button').click()")
        page.wait_for(f"{chat}.innerText.includes('kv_keep_ratio')")
        elsewhere = [url for url in page.urls if urlsplit(url).hostname not in ("127.0.0.1", None)]
        # FastAPI's icon, which the page does not need.
        assert [url for url in elsewhere if not url.endswith(".png")] == []
