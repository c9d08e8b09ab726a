"""Shared engines: a start takes half a minute, so tests of one kind share one."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

# Before vLLM is imported: its CPU worker reads them once. In-process engines let tests look at blocks and rows.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Two threads on two busy cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor may the two of `make test` spin for each other: beside any other work that is four times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_report_header() -> str:
    from vllm_l2kv.supported_vllm import vllm_version

    return f"vLLM {vllm_version()}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--demo-model", type=Path, help="folder of the demo model, instead of fetching it")
    parser.addoption("--soak-requests", type=int, default=140, help="requests of each test of churn")
    parser.addoption("--results", type=Path, default=os.devnull, help="file for rows of what tests measured")
    parser.addoption("--rows", type=Path, help="folder to which tests/gpu/test_two_gpus.py adds rows of what it found")
    parser.addoption("--no-engines", action="store_true", help="leave out tests marked `engine`, fail others with one")
    parser.addoption("--gpu-engine-args", type=json.loads, default={}, help="more of vLLM's for engines on two GPUs")
    parser.addoption("--playground-pictures", type=Path, help="where tests/serving/test_playground.py draws its page")


@pytest.hookimpl(tryfirst=True)  # before pytest looks at `-m`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch
    from no_engines import ENGINE_FOLDERS

    for item in items:
        if item.path.parent.name in ENGINE_FOLDERS:
            item.add_marker(pytest.mark.engine)
    if config.getoption("--no-engines"):
        marked = [item for item in items if item.get_closest_marker("engine")]
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if item not in marked]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: `make test-gpu` there"))


def pytest_collection_finish(session: pytest.Session) -> None:
    # vLLM's CPU worker, once imported, puts placeholders where torch's CUDA events and streams were.
    if "vllm.v1.worker.cpu.shm" in sys.modules and any(
        item.get_closest_marker("gpu") and not item.get_closest_marker("skip") for item in session.items
    ):
        raise pytest.UsageError("tests of CPUs and of GPUs do not share a process: `make test-gpu` runs the latter")


@pytest.fixture(scope="session", autouse=True)
def no_engines(request) -> Iterator[None]:
    """With `--no-engines` a test that starts one fails."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.config.getoption("--no-engines"):
            from no_engines import refuse_engines

            refuse_engines(monkeypatch)
        yield


@pytest.fixture(scope="session")
def demo_model(request) -> Path:
    from vllm_l2kv.tools.demo_model import ensure_demo_model

    return request.config.getoption("--demo-model") or ensure_demo_model()


@pytest.fixture(scope="session")
def tokenizer(demo_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="session")
def text_ids(tokenizer) -> list[int]:
    """Tokens of English prose followed by a licence, more than 4,000 of them."""
    root = Path(__file__).parent.parent
    text = (root / "examples" / "lighthouse.txt").read_text() + (root / "LICENSE").read_text()
    return tokenizer(text)["input_ids"]


@pytest.fixture(scope="session")
def reference(demo_model):
    from reference import Reference

    return Reference(demo_model)


@pytest.fixture(scope="session")
def num_requests(request) -> int:
    return request.config.getoption("--soak-requests")


@pytest.fixture(scope="session")
def results(request) -> Iterator[TextIO]:
    with request.config.getoption("--results").open("w") as file:
        yield file


@pytest.fixture
def measured(request, results) -> Callable[..., None]:
    """Writes a row of what a test measured to the file of `--results`; tests call it once their checks have passed."""
    from benchmarks.load.servers import machine
    from vllm_l2kv.supported_vllm import vllm_version

    def measured(**found: Any) -> None:
        row = {"test": request.node.nodeid, "machine": machine(), "vllm": vllm_version(), **found}
        print(json.dumps(row), file=results, flush=True)

    return measured


@pytest.fixture(scope="session")
def tiny_model(demo_model, tmp_path_factory) -> Callable[..., Path]:
    """Writes a tiny model of `tiny.<kind>(**changes)`, once for each."""
    import tiny

    root, written = tmp_path_factory.mktemp("tiny"), {}

    def model(kind: str, **changes: Any) -> Path:
        key = (kind, repr(sorted(changes.items())))
        if key not in written:
            config = getattr(tiny, kind)(**changes)
            written[key] = tiny.write(root / f"{len(written)}-{kind}", config, demo_model)
        return written[key]

    return model


@pytest.fixture(scope="session")
def llama(tiny_model) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def server(demo_model, tmp_path_factory) -> Iterator:
    """One for all tests that only ask; it protects nothing, calls tools and takes templates from requests."""
    from http_server import Server

    words = "--max-model-len 4096 --enforce-eager --dtype float32 --enable-auto-tool-choice --tool-call-parser hermes"
    words += " --trust-request-chat-template"
    # Without MODEL: that serves the demo model under its own name, and the fixture has fetched it.
    with Server(tmp_path_factory.mktemp("server") / "server.log", *words.split()) as server:
        yield server


def start(demo_model: Path, **arguments: object):
    from engine import Engine

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 32,
        "seed": 0,
    }
    return Engine(demo_model, **{**defaults, **arguments})


@pytest.fixture(scope="session")
def compressing(demo_model) -> Iterator:
    """Full layers {0, 1}, prompts cut into chunks of 512 tokens."""
    from engine import bare_rule

    engine = start(demo_model, **bare_rule(full_layers=(0, 1)))
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def all_layers(demo_model) -> Iterator:
    """No full layers: one KV-cache group in vLLM's own layout."""
    from engine import bare_rule

    engine = start(demo_model, **bare_rule(full_layers=()))
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def stock(demo_model) -> Iterator:
    """vLLM without us."""
    engine = start(demo_model, block_size=32)
    yield engine
    engine.shutdown()
