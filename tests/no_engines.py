"""What keeps `make test-fast` fast."""

import functools

import pytest

ENGINE_FOLDERS = {"compat", "e2e", "gpu"}
"""All of their tests count as marked `engine`."""
SENTENCE = "This test starts an engine, which takes half a minute; `make test-fast` leaves out what is marked `engine`."


def refuse_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the start of an engine fail, be it in this process or in a server's."""
    from http_server import Server
    from vllm.v1.engine.core import EngineCore

    for cls in (EngineCore, Server):

        @functools.wraps(cls.__init__)  # some tests read its source
        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError(SENTENCE)

        monkeypatch.setattr(cls, "__init__", refuse)
