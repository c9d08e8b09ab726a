"""Engines of tiny models: a start takes two seconds, the first of an architecture ten."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The real server in a process of its own, for tests of several processes.
sys.path.append(str(Path(__file__).parent.parent / "e2e"))


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    from engine import running

    return running


@pytest.fixture(scope="session")
def llama_reference(llama):
    from reference import Reference

    return Reference(llama)


@pytest.fixture(scope="module")
def engine(llama) -> Iterator[Any]:
    """Full layer 0 in blocks of 96 tokens, three compressed layers in blocks of 32."""
    from engine import running

    with running(llama) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(llama) -> Iterator[Any]:
    """vLLM without us."""
    from engine import running

    with running(llama, full_layers=None) as engine:
        yield engine


@pytest.fixture(scope="session")
def cases(text_ids) -> list[tuple[list[int], str]]:
    """Prompts and ratios. No prompt is the beginning of another one, so nothing comes from the prefix cache."""
    lengths_and_ratios = [(length, ratio) for length in (1, 33, 97, 200, 700) for ratio in ("1.0", "0.5", "0.25")]
    return [(text_ids[11 * i : 11 * i + length], ratio) for i, (length, ratio) in enumerate(lengths_and_ratios)]


@pytest.fixture(scope="session")
def check_exact(cases) -> Callable[..., None]:
    """All cases in one batch, greedy, each against the reference."""
    from engine import keep

    def check(engine, reference, full_layers=(0,), num_tokens=12, bos=()):
        prompts = [[*bos, *prompt] for prompt, _ in cases]
        params = [keep(ratio, num_tokens=num_tokens) for _, ratio in cases]
        answers = engine.tokens(prompts, params)
        differing = 0
        for prompt, (_, ratio), answer in zip(prompts, cases, answers, strict=True):
            expected = reference.generate(prompt, num_tokens, ratio, full_layers)
            assert answer == expected, f"{len(prompt)} tokens, keep {ratio}"
            differing += expected != reference.generate(prompt, num_tokens, "1", full_layers)
        assert differing >= 2, "what is compared must depend on the ratio"

    return check
