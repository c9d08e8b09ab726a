"""Every example against the real server or engine: it succeeds and prints the kept rows."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
from http_server import INTERVALS, expected_usage

from vllm_l2kv.params import FIELD_NAMES, CompressionParams
from vllm_l2kv.policy import num_keep

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"
USAGE = re.compile(r"\{[^{}]*evicted_tokens[^{}]*\}")
"""`kv_cache` as Python, JSON or JavaScript prints it."""
ASKED = {
    "client.py": (1.0, 0.7, 0.5),
    "kv_usage.py": (1.0, 0.7, 0.5),
    "langchain_chat.py": (0.25,),
    "llama_index_chat.py": (0.5,),
    "node_client.mjs": (0.5,),
    "streaming.py": (0.5,),
    "tools.py": (0.5,),
}
"""The keep ratios whose numbers an example prints."""
DOCUMENTS = {"document_questions.py": 4, "langchain_documents.py": 3}
"""Number of times that an example asks about its document."""
MODULES = {
    "langchain_chat.py": "langchain_openai",
    "langchain_documents.py": "langchain_openai",
    "llama_index_chat.py": "llama_index.llms.openai_like",
}
"""Packages that an example needs beyond the lock."""


def interpreter(example: str) -> str:
    """Returns the program that runs an example; skips the test if something is missing."""
    if example.endswith(".mjs"):
        node = shutil.which("node") or pytest.skip("needs node")
        resolve = [node, "--input-type=module", "--eval", "import.meta.resolve('openai')"]
        if subprocess.run(resolve, cwd=EXAMPLES, capture_output=True, check=False).returncode:
            pytest.skip("needs the npm package openai: npm install --no-save openai")
        return node
    if module := MODULES.get(example):
        try:
            found = find_spec(module)
        except ModuleNotFoundError:
            found = None
        if not found:
            pytest.skip(f"needs the Python module {module}, see the head of examples/{example}")
    return sys.executable


def run(command: Sequence[str], **environment: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def printed_usage(text: str) -> list[dict[str, int]]:
    return [ast.literal_eval(found) for found in USAGE.findall(text)]


def expected(found: dict[str, int], /, **params: float) -> dict[str, int | str]:
    """Returns what an example must print; the length of its answer follows from its output."""
    num_computed = found["kept_tokens"] + found["evicted_tokens"]
    return expected_usage(found["prompt_tokens"], num_computed + 1 - found["prompt_tokens"], **params)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """A text of two paragraphs, so that an answer takes a second."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join((EXAMPLES / "lighthouse.txt").read_text().split("\n\n")[1:3]))
    return file


@pytest.mark.parametrize("example", ASKED)
def test_a_client(server, text_file, example):
    command = [interpreter(example), str(EXAMPLES / example), str(text_file)]
    numbers = printed_usage(run(command, OPENAI_BASE_URL=f"{server.url}/v1"))
    assert len(numbers) == len(ASKED[example])
    for ratio, found in zip(ASKED[example], numbers, strict=True):
        assert found == expected(found, keep_ratio=ratio)
        assert (found["evicted_tokens"] > 0) == (ratio < 1)


def num_document_tokens(tokenizer, text: str) -> int:
    """Returns the tokens of a document that is the first message of a chat."""
    return len(tokenizer.apply_chat_template([{"role": "system", "content": text}], return_dict=False))


def check_one_computed_the_document(numbers: list[dict[str, int]], num_tokens: int, keep_ratio: float = 0.5) -> None:
    """Checks that one request computed the document and all others found it."""
    assert sorted(found["found_tokens"] for found in numbers) == [0] + [num_tokens] * (len(numbers) - 1)
    for found in numbers:
        params = {"keep_ratio": keep_ratio, "prefix_tokens": num_tokens, "found": found["found_tokens"]}
        assert found == expected(found, **params)
        assert found["evicted_tokens"] > num_tokens * (1 - keep_ratio) * 2 / 3


@pytest.mark.parametrize("example", DOCUMENTS)
def test_a_document_is_compressed_once(server, text_file, tokenizer, tmp_path, example):
    file = tmp_path / "document.txt"
    file.write_text(f"{example}: {text_file.read_text()}")  # no other test uses this text
    command = [interpreter(example), str(EXAMPLES / example), str(file)]
    numbers = printed_usage(run(command, OPENAI_BASE_URL=f"{server.url}/v1"))
    assert len(numbers) == DOCUMENTS[example]
    check_one_computed_the_document(numbers, num_document_tokens(tokenizer, file.read_text()))


def test_a_document_by_curl(server, tokenizer):
    numbers = printed_usage(run(["bash", str(EXAMPLES / "documents.sh"), server.url]))
    assert len(numbers) == 2
    document = "The keeper climbed the one hundred and sixty-eight steps at sunset. " * 60
    check_one_computed_the_document(numbers, num_document_tokens(tokenizer, document), keep_ratio=0.25)


def test_an_agent_begins_a_turn_at_the_last_compaction(server, tmp_path):
    """The pages are long enough for the server's interval; the last prompt is the second one beyond it."""
    file = tmp_path / "book.txt"
    text = (EXAMPLES / "lighthouse.txt").read_text() + (EXAMPLES.parent / "LICENSE").read_text()
    file.write_text(" ".join(text.split()[:2800]))
    command = [sys.executable, str(EXAMPLES / "agent_loop.py"), str(file), "8"]
    numbers = printed_usage(run(command, OPENAI_BASE_URL=f"{server.url}/v1"))
    assert len(numbers) == 8
    budget = 512
    for found in numbers:
        asked = expected(found, max_tokens=budget, found=found["found_tokens"])
        asked.pop("reason", None)
        assert found == {"found_tokens": 0, **asked}
    *earlier, last = (found["found_tokens"] for found in numbers)
    assert earlier == [0] * 7
    assert last == budget + INTERVALS.prompt


def test_curl(server):
    text = run(["bash", str(EXAMPLES / "curl.sh"), server.url])
    (found,) = printed_usage(text)
    assert found == expected(found, keep_ratio=0.5, protect_last=4)
    assert '"full_layers":[0,1]' in text
    assert '"param":"kv_keep_ratio"' in text


def test_the_request_that_the_server_prints_is_compressed(server):
    (line,) = re.findall(r"^curl .*", server.log.read_text(), re.MULTILINE)
    (found,) = printed_usage(run([*shlex.split(line), "--silent"]))
    body = json.loads(shlex.split(line)[-1])
    # With the protected rows of a server without options.
    asked = CompressionParams().override({name: value for name, value in body.items() if name in FIELD_NAMES})
    assert num_keep(found["prompt_tokens"], asked) < 0.6 * found["prompt_tokens"]
    assert found["evicted_tokens"] > 0


@pytest.mark.slow  # an engine of its own
def test_offline(demo_model):
    text = run([sys.executable, str(EXAMPLES / "offline.py"), str(demo_model)], VLLM_ENABLE_V1_MULTIPROCESSING="1")
    (found,) = printed_usage(text)
    assert found == expected(found, keep_ratio=0.5)
    assert text.count("---") == 2


@pytest.mark.slow  # an engine of its own
def test_offline_documents(demo_model, tokenizer):
    numbers = printed_usage(run([sys.executable, str(EXAMPLES / "offline_documents.py"), str(demo_model)]))
    assert len(numbers) == 3
    check_one_computed_the_document(numbers, num_document_tokens(tokenizer, (EXAMPLES / "lighthouse.txt").read_text()))


def test_no_example_is_left_out():
    scripts = {file.name for file in EXAMPLES.iterdir() if file.is_file() and file.suffix != ".txt"}
    others = {"agent_loop.py", "curl.sh", "documents.sh", "offline.py", "offline_documents.py"}
    assert scripts == {*ASKED, *DOCUMENTS, *others}
