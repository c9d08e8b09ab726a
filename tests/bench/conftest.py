"""A server that is none: it speaks as vLLM does, and answers at once."""

from collections.abc import Callable, Iterator

import pytest
from fake_vllm import Fake


@pytest.fixture
def start() -> Iterator[Callable[..., Fake]]:
    """Starts servers of `Fake`'s arguments."""
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
