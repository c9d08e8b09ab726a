"""Refuses engines in `make test-fast`."""

import functools

import pytest

ENGINE_FOLDERS = {"compat", "e2e", "gpu", "serving"}
"""Folders in which all tests count as marked `engine`."""
SENTENCE = "This test starts an engine, which takes half a minute; `make test-fast` leaves out what is marked `engine`."


def refuse_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the start of an engine fail, in this process and in a server's."""
    from http_server import Server
    from vllm.v1.engine.core import EngineCore

    for cls in (EngineCore, Server):

        @functools.wraps(cls.__init__)  # some tests read its source
        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError(SENTENCE)

        monkeypatch.setattr(cls, "__init__", refuse)
