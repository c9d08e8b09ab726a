"""A fake server with vLLM's API that answers at once."""

from collections.abc import Callable, Iterator

import pytest
from fake_vllm import Fake


@pytest.fixture
def start() -> Iterator[Callable[..., Fake]]:
    """Starts servers with arguments of `Fake`."""
    started: list[Fake] = []

    def start(**arguments) -> Fake:
        started.append(Fake(**arguments))
        return started[-1]

    yield start
    for fake in started:
        fake.stop()


@pytest.fixture
def ours(start) -> Fake:
    return start()
