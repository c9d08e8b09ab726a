"""What keeps `make test-fast` fast."""

import pytest

SENTENCE = "This test starts an engine, which takes half a minute; `make test-fast` leaves out what is marked `engine`."


def refuse_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the start of an engine fail, be it in this process or in a server's."""
    from http_server import Server
    from vllm.v1.engine.core import EngineCore

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(SENTENCE)

    monkeypatch.setattr(EngineCore, "__init__", refuse)
    monkeypatch.setattr(Server, "__init__", refuse)
